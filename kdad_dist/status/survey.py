"""`kdad status`: how the runs below a folder are doing, told from the files that they keep.

Nothing is asked but the disk, and torch is not imported: it answers at once, on login nodes too.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdad_dist import files
from kdad_dist.config.load import CONFIG_FILE, SWEEP_FILE
from kdad_dist.errors import CheckpointError, UsageError
from kdad_dist.runtime.manifest import read_manifest, verify
from kdad_dist.runtime.rundir import (
    CHECKPOINTS,
    DATA_FILE,
    LOG_FILE,
    STATUS_FILE,
    last_words,
    results,
)
from kdad_dist.wording import beside

SILENT = 30 * 60.0
"""Seconds after which a run that says it is running, and writes nothing, is not believed: for as
long a launch waits for a process that hangs (train.timeout_minutes)."""
TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl, among which the last losses are."""
STATES = (
    "running",
    "scoring",
    "stale",
    "failed",
    "preempted",
    "not started",
    "finished",
    "unknown",
)


@dataclass(frozen=True)
class RunStatus:
    """One run, as it is now; None: not known, or not yet."""

    run: str
    sweep: str | None
    """The directory of the sweep that it belongs to."""
    state: str
    """One of STATES."""
    reason: str | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    """For what is left of the steps at that pace, of a run that is running."""
    updated: str | None = None
    job: str | None = None
    """In SLURM."""
    process: str | None = None
    """That holds its directory, such as "pid 7 on node1"."""
    checkpoint: int | None = None
    """Step of the newest checkpoint that is sound: its manifest is, and its files are there in
    full; on request, their hashes are right."""
    damaged: tuple[str, ...] = ()
    """What is wrong with those that are newer."""
    metrics: dict[str, Any] | None = None
    """The means that scoring measured, of the checkpoint that `score.checkpoint` names, or of the
    other where that alone is scored."""


def survey(
    folder: Path, content: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[RunStatus]:
    """Every run in or below a folder, by path.

    Args:
        content: whether checkpoints are read and hashed, which takes as long as that takes.
        progress: called with the runs done and all runs.

    Raises:
        UsageError: there is none.
    """
    if not folder.is_dir():
        near = beside(folder, "*/")
        raise UsageError(f"there is no directory {folder}", f"{near}check the path")
    below, found = list(runs(folder)), []
    for run, started in below:
        found.append(look(run, content) if started else waiting(run))
        if progress is not None:
            progress(len(found), len(below))
    if not found:
        raise UsageError(
            f"there is no run in or below {folder}",
            "give a directory that `kdad train` or `kdad sweep` wrote, or one above it",
        )
    return found


def runs(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Directories of runs, and whether they were started, or only are to be by their sweep."""
    for name, folders, names in os.walk(folder):
        path = Path(name)
        if is_run(path):
            folders.clear()
            yield path, True
            continue
        folders[:] = sorted(child for child in folders if not child.startswith("."))
        if SWEEP_FILE in names:
            configs = {n for n in names if n.endswith(".yaml")} - {SWEEP_FILE}
            planned = [path / Path(config).stem for config in sorted(configs)]
            yield from ((run, False) for run in planned if not is_run(run))


def is_run(path: Path) -> bool:
    return (path / STATUS_FILE).is_file() or all(
        (path / name).is_file() for name in (CONFIG_FILE, DATA_FILE)
    )


def waiting(run: Path) -> RunStatus:
    """A run that its sweep has planned, and that has not written anything."""
    holder = files.holder(run)
    if holder.holds:
        return RunStatus(str(run), str(run.parent), "running", f"{holder.text} is starting")
    reason = last_words(run.with_name(f"{run.name}.log"))
    return RunStatus(str(run), str(run.parent), "not started", reason)


def look(run: Path, content: bool) -> RunStatus:
    """What the files of a run say, which may be written meanwhile."""
    said, holder = files.read_json(run / STATUS_FILE), files.holder(run)
    told, held = (written(run / name) for name in (STATUS_FILE, files.LOCK))
    silent = time.time() - max(told, held, written(run / LOG_FILE))
    state, reason = judge(said, holder, silent, is_new=held > told)
    if state != "running":
        state, reason, holder = scored(run, state, reason, holder)
    checkpoint, damaged = newest(run / CHECKPOINTS, content)
    # The step is noted every few seconds, so that a checkpoint may be ahead of it.
    step, steps = max(number(said.get("step")), checkpoint or 0), number(said.get("steps"))
    lines = losses(run / LOG_FILE)
    line = lines[0] if lines else {}
    # Of two networks that take turns, the run's loss is the student's.
    students = (line["loss"] for line in lines if "discriminator" not in line)
    return RunStatus(
        run=str(run),
        sweep=str(run.parent) if (run.parent / SWEEP_FILE).is_file() else None,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        loss=next(students, None),
        images_per_second=line.get("images_per_second"),
        seconds_left=seconds_left(steps - step, line) if state == "running" else None,
        updated=said.get("updated"),
        job=said.get("job"),
        process=holder.text if holder.holds else None,
        checkpoint=checkpoint,
        damaged=damaged,
        metrics=files.read_json(results(run)[0].metrics).get("mean"),
    )


def judge(
    said: dict[str, Any],
    holder: files.Holder,
    silent: float,
    is_new: bool,
    here: str = os.uname().nodename,
) -> tuple[str, str | None]:
    """State and reason of a run, of which `status.json` alone may know too little.

    Args:
        silent: seconds for which it has written nothing.
        is_new: whether its last start has not come to say anything.
        here: the name of this machine.
    """
    state, reason = said.get("state"), said.get("reason")
    quiet = f"nothing was written for {silent / 60:.0f} min"
    if holder.holds and is_new:
        return "running", f"{holder.text} is starting"
    if holder.holds and state == "running":
        if silent > SILENT:
            return "stale", f"{quiet}, though {holder.text} is there: does it hang?"
        return "running", None
    if state == "running" and holder.text.endswith(f" on {here}"):
        return "stale", f"{holder.text} has ended without a word: killed, or out of memory?"
    # The lock of a process on another machine is not seen from here on every file system.
    if state == "running" and silent > SILENT:
        return "stale", f"{quiet}, and nobody is seen to hold it"
    if state not in STATES:
        return "unknown", f"{STATUS_FILE} is missing or damaged"
    return state, reason


def scored(
    run: Path, state: str, reason: str | None, holder: files.Holder
) -> tuple[str, str | None, files.Holder]:
    """State, reason and holder of a run that is not trained now: it may be scored."""
    folders = sorted(run.glob("*.partial"))
    for folder in folders:
        if (scorer := files.holder(folder)).holds:
            return "scoring", f"{scorer.text} fills {folder.name}", scorer
    if state == "finished" and any(folder.name.startswith("scores") for folder in folders):
        reason = "a scoring stopped before it was done: the same `kdad score` goes on with it"
    return state, reason, holder


def written(path: Path) -> float:
    """When a file was last written, 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def losses(path: Path) -> list[dict[str, Any]]:
    """The last lines of `metrics.jsonl` with losses, the newest first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except ValueError:  # the first, which is cut, or the last, which is being written
            continue
        if isinstance(line, dict) and "loss" in line:
            found.append(line)
    return found


def seconds_left(steps: int, line: dict[str, Any]) -> float | None:
    """How long the steps will take at the pace of a line; without validations and saving."""
    step, seen, pace = (line.get(k) for k in ("step", "samples_seen", "images_per_second"))
    if not (step and seen and pace):
        return None
    return round(steps * (seen / step) / pace, 1)


def newest(folder: Path, content: bool) -> tuple[int | None, tuple[str, ...]]:
    """Step of the newest sound checkpoint, and what is wrong with those that are newer."""
    faults = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            verify(path, content=content)
            return read_manifest(path)["step"], tuple(faults)
        except CheckpointError as error:
            if path.is_dir():  # or it was pruned meanwhile
                faults.append(error.problem)
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
    return None, tuple(faults)


def number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def tally(found: Sequence[RunStatus]) -> str:
    """How many are in which state: "2 running, 1 failed"."""
    counts = Counter(run.state for run in found)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
