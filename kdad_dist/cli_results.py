"""The verbs that show what a run has come to, and pass it on."""

from typing import Annotated

import typer

from kdad_dist.cli_choices import Format, Overrides, Run
from kdad_dist.cli_text import say


def report(run: Run) -> None:
    """Write one self-contained HTML page about a run."""
    from kdad_dist.report import write_report

    say(f"report: {write_report(run)}")


def export(
    run: Run,
    overrides: Overrides = None,
    format: Annotated[Format, typer.Option(help="Kind of file.")] = Format.SAFETENSORS,
) -> None:
    """Write the student's weights to one file, checked against the checkpoint."""
    from kdad_dist.config import load_run
    from kdad_dist.export import export as export_run

    path, difference = export_run(load_run(run, overrides or []))
    say(f"exported: {path}\nlargest difference to the checkpoint: {difference:g}")
