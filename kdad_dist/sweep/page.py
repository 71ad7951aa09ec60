"""The page of a sweep: its tables, its curves, and the way to the page of each run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdad_dist import __version__, files
from kdad_dist.config.changes import flatten
from kdad_dist.config.load import dump, plain
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import KdadError
from kdad_dist.report.charts import Chart
from kdad_dist.report.data import read_log
from kdad_dist.report.overlay import Compared, figures_chart, overlaid
from kdad_dist.report.page import template
from kdad_dist.report.png import FIGURES, write_pngs
from kdad_dist.report.tables import DASH, curve
from kdad_dist.runtime.progress import uncounted
from kdad_dist.runtime.rundir import LOG_FILE
from kdad_dist.sweep.jobs import SCORED, Sweep
from kdad_dist.sweep.published import METRICS
from kdad_dist.sweep.table import write_table
from kdad_dist.sweep.text import Table, as_latex, as_markdown, compared, first, grids, remarks
from kdad_dist.wording import amount

PAGE, LATEX = "report.html", "table.tex"


@dataclass(frozen=True)
class Link:
    """A run, and where its own page is."""

    name: str
    seed: int
    state: str
    reason: str | None
    steps: str
    """Of the selected and the final checkpoint."""
    href: str | None


def write_page(sweep: Sweep, latex: bool = False, png: bool = False) -> Table:
    """Writes the table and the page of a sweep as it is now; what is asked for beside them.

    Returns:
        The content of `table.json`.

    Raises:
        DataError: the directory cannot be written.
    """
    with uncounted(f"reading {amount(len(sweep.jobs), 'run')}"):
        found = write_table(sweep)
        charts = drawings(sweep, found)
    page = template("sweep.html.j2").render(
        version=__version__,
        sweep=sweep,
        found=found,
        grids=grids(found),
        remarks=remarks(found),
        charts=charts,
        curves=curves(sweep),
        unlike=unlike(sweep),
        links=(runs := links(sweep, found)),
        first={link.name: link for link in reversed(runs)},
        config_text=dump(sweep.base),
        done=sum(run["state"] == SCORED for run in found["runs"]),
    )
    with files.writing(sweep.directory):
        files.write_text(sweep.directory / PAGE, page)
        if latex:
            files.write_text(sweep.directory / LATEX, as_latex(found))
        if png:
            write_pngs(charts, sweep.directory / FIGURES)
    return found


def links(sweep: Sweep, found: Table) -> list[Link]:
    entries = []
    for job, run in zip(sweep.jobs, found["runs"], strict=True):
        steps = [
            run["provenance"].get(kind, {}).get("checkpoint_step") for kind in ("selected", "final")
        ]
        href = f"{quote(job.run.name, safe='')}/report.html"
        entries.append(
            Link(
                job.name,
                job.config.seed,
                run["state"],
                run["reason"],
                " / ".join(DASH if step is None else str(step) for step in steps),
                href if (job.run / "report.html").is_file() else None,
            )
        )
    return entries


def drawings(sweep: Sweep, found: Table) -> dict[str, Chart]:
    """The charts of the page, by the names of their files."""
    charts = {key: figures_chart(METRICS[key], figures(found, key)) for key in compared(found)}
    logs = {job.run: log(job.run) for job in sweep.jobs}
    for key, title in curves(sweep).items():
        lines = [
            (name, [curve(logs[job.run], key) for job in sweep.jobs if job.name == name])
            for name in sweep.names
        ]
        charts[key] = overlaid(title, "loss per image", lines)
    return {name: chart for name, chart in charts.items() if chart is not None}


def figures(found: Table, key: str) -> list[Compared]:
    return [
        Compared(name, figure["mean"], figure["deviation"], first(figure["published"]))
        for name, figure in ((name, row[key]) for name, row in found["categories"].items())
    ]


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where it cannot be read, which its page will say."""
    try:
        return read_log(run / LOG_FILE)[0]
    except KdadError:
        return []


def curves(sweep: Sweep) -> dict[str, str]:
    """The keys of the log to draw, and their titles.

    Ways to distil a classifier learn by sums of different losses: what they have in common is
    cross-entropy, which is also the loss on held-out images. Of other methods' variants, losses
    that are not the same are not drawn: on one axis they would look as if they compared.
    """
    if unlike(sweep):
        return {}
    if sweep.base.tells_classes:
        name, train = "Cross-entropy", "cross_entropy"
    else:
        name, train = "Loss", "loss"
    return {train: f"{name} on training images", "val_loss": f"{name} on held-out images"}


def unlike(sweep: Sweep) -> list[str]:
    """Keys by which the variants learn something else, or by another loss, than each other."""
    if all(job.config.tells_classes for job in sweep.jobs):
        return []
    objectives = [objective(job.config) for job in sweep.jobs]
    keys = {key for values in objectives for key in values}
    return sorted(k for k in keys if len({repr(values.get(k)) for values in objectives}) > 1)


def objective(config: RunConfig) -> dict[str, Any]:
    """The dotted keys that decide what is learnt, and by which loss, and their values."""
    method = config.method
    others = {*method.READING, *method.COSTS, *method.SAME_LOSS}
    values = {key: value for key, value in plain(config)["method"].items() if key not in others}
    return dict(flatten(values, "method."))


def result(sweep: Sweep, found: Table) -> str:
    """What a person is told at the end."""
    table, page = sweep.directory / "table.md", sweep.directory / PAGE
    return f"{as_markdown(found)}\ntable: {table}\nreport: {page}"
