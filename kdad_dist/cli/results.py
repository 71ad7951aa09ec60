"""The verbs that show what a run has come to, and pass it on."""

from pathlib import Path
from typing import Annotated

import typer

from kdad_dist.cli.choices import Format, Json, Overrides, Run
from kdad_dist.cli.text import LOADING, exported, say, tell
from kdad_dist.errors import UsageError


def report(
    run: Annotated[Path, typer.Argument(help="The directory of a run, or of a sweep.")],
    latex: Annotated[
        bool, typer.Option("--latex", help="A sweep's tables as table.tex too.")
    ] = False,
    png: Annotated[bool, typer.Option("--png", help="The charts in figures/ too.")] = False,
) -> None:
    """Write one self-contained HTML page about a run or a sweep."""
    from kdad_dist.report.page import write_report
    from kdad_dist.report.png import FIGURES
    from kdad_dist.sweep.page import LATEX, result, write_page
    from kdad_dist.sweep.plan import is_sweep, reopen

    if is_sweep(run):
        sweep = reopen(run)
        written = [result(sweep, write_page(sweep, latex, png))]
    elif latex:
        raise UsageError("--latex is of a sweep", "leave it out, or give the directory of a sweep")
    else:
        written = [f"report: {write_report(run, png)}"]
    written += [f"latex: {run / LATEX}"] * latex + [f"charts: {run / FIGURES}"] * png
    say("\n".join(written))


def export(
    run: Run,
    overrides: Overrides = None,
    format: Annotated[
        Format,
        typer.Option(help="The student's weights (safetensors), or all that judges an image."),
    ] = Format.SAFETENSORS,
    compare: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Test images to compare on; 0: all. By default 64; 4 for weights with LoRA, of "
            "others none.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one file for other programs, compared with the run."""
    from kdad_dist.config.load import load_run
    from kdad_dist.runtime.progress import uncounted

    with uncounted(LOADING):
        from kdad_dist.export.write import export as export_run

    facts = export_run(load_run(run, overrides or []), format.value, compare)
    tell(exported(facts), facts, as_json)
