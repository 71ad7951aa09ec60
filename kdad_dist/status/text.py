"""What `kdad status` shows to a person: a line for each run, again and again where asked for."""

import time
from collections.abc import Sequence, Set
from itertools import groupby
from pathlib import Path

from rich.live import Live
from rich.text import Text

from kdad_dist.runtime.progress import CONSOLE, SECONDS_BETWEEN_LINES, draws
from kdad_dist.status.survey import RunStatus, survey, tally
from kdad_dist.wording import aligned, amount, duration, on_one_line, printable

HEADER = ("state", "run", "step", "loss", "images/s", "left", "checkpoint", "result", "job")
COLOURS = {
    "running": "cyan",
    "scoring": "cyan",
    "stale": "bold red",
    "failed": "red",
    "preempted": "yellow",
    "finished": "green",
    "unknown": "magenta",
}
FIRST = (
    *("running", "scoring", "stale", "failed", "unknown"),
    *("preempted", "finished", "not started"),
)
"""Whose lines stay where there is no room for all: of what goes on, and of what is amiss."""
EVERY = 2.0
"""Seconds between two looks, on a terminal."""


def shown(found: Sequence[RunStatus], asked: Path, kept: Set[str] | None = None) -> Text:
    """The runs in or below the folder that was asked for, those of a sweep together.

    Args:
        kept: directories of the runs that have lines; None: all.
    """
    runs = sorted(found, key=lambda run: (run.sweep or "", run.run))
    told = [run for run in runs if kept is None or run.run in kept]
    header, *lines = aligned([HEADER, *map(cells, told)], left=2)
    text = Text(f"{amount(len(runs), 'run')}: {tally(runs)}\n").append(header + "\n", "dim")
    line = iter(lines)
    for sweep, group in groupby(runs, lambda run: run.sweep):
        members = list(group)
        if sweep is not None:
            # Of the sweep of a run that was asked for itself, the others were not looked at.
            name, alone = on_one_line(sweep), Path(members[0].run) == asked
            title = f"of sweep {name}" if alone else f"sweep {name}: {tally(members)}"
            text.append(f"{title}\n", "bold")
        for run in members:
            if kept is not None and run.run not in kept:
                continue
            said = next(line)
            text.append(said[: len(run.state)], COLOURS.get(run.state, ""))
            text.append(f"{said[len(run.state) :]}\n")
            for why in (run.reason, *run.damaged):
                if why:
                    text.append(
                        "".join(f"    {printable(part)}\n" for part in why.splitlines()), "dim"
                    )
    if kept is not None:
        rest = [run for run in runs if run.run not in kept]
        text.append(f"and {len(rest)} more, for which there is no room: {tally(rest)}", "dim")
    text.rstrip()
    return text


def fitting(found: Sequence[RunStatus], asked: Path) -> Text:
    """The same with no more lines than the terminal has."""
    first = sorted(found, key=lambda run: FIRST.index(run.state))
    text, count = shown(found, asked), min(len(found), CONSOLE.height)
    while count and len(CONSOLE.render_lines(text, pad=False)) > CONSOLE.height:
        count -= 1
        text = shown(found, asked, {run.run for run in first[:count]})
    return text


def cells(run: RunStatus) -> tuple[str, ...]:
    """A line of the table."""
    checkpoint = "" if run.checkpoint is None else str(run.checkpoint)
    return (
        run.state,
        run.run,
        f"{run.step}/{run.steps}" if run.steps else "",
        figure(run.loss, ".4g"),
        figure(run.images_per_second, ".1f"),
        "" if run.seconds_left is None else duration(run.seconds_left),
        f"{checkpoint} (newer: damaged)" if run.damaged else checkpoint,
        result(run),
        run.job or "",
    )


def figure(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def result(run: RunStatus) -> str:
    """The first figure that scoring could compute."""
    known = run.metrics or {}
    for name, title in (("image_auroc", "AUROC"), ("accuracy", "accuracy")):
        if text := figure(known.get(name), ".4f"):
            return f"{title} {text}"
    return ""


def show(text: Text) -> None:
    """Lines that no narrow pipe cuts off, in colours on a terminal."""
    CONSOLE.print(text, soft_wrap=True, highlight=False)


def watch(folder: Path) -> None:
    """Shows the runs again and again, until Ctrl-C; on a terminal in place, and all in the end."""
    if not draws():
        while True:
            show(shown(survey(folder), folder))
            time.sleep(SECONDS_BETWEEN_LINES)
    found = survey(folder)
    with Live(fitting(found, folder), console=CONSOLE, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(EVERY)
                found = survey(folder)
                live.update(fitting(found, folder), refresh=True)
        finally:
            live.update(shown(found, folder))  # drawn as it is left, however long
