"""The verbs that show what a run has come to, and pass it on."""

from pathlib import Path
from typing import Annotated

import typer

from kdad_dist.cli_choices import Format, Overrides, Run
from kdad_dist.cli_text import say
from kdad_dist.errors import UsageError


def report(
    run: Annotated[Path, typer.Argument(help="The directory of a run, or of a sweep.")],
    latex: Annotated[
        bool, typer.Option("--latex", help="A sweep's tables as table.tex too.")
    ] = False,
    png: Annotated[bool, typer.Option("--png", help="The charts in figures/ too.")] = False,
) -> None:
    """Write one self-contained HTML page about a run or a sweep."""
    from kdad_dist.report import write_report
    from kdad_dist.sweep_page import result, write_page
    from kdad_dist.sweep_plan import is_sweep, reopen

    if is_sweep(run):
        sweep = reopen(run)
        say(result(sweep, write_page(sweep, latex, png)))
        return
    if latex:
        raise UsageError("--latex is of a sweep", "leave it out, or give the directory of a sweep")
    say(f"report: {write_report(run, png)}")


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
