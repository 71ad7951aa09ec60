"""The runs of a sweep as SLURM arrays: one task for each run that is not done."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdad_dist import files
from kdad_dist.errors import KdadError, UsageError
from kdad_dist.sweep.jobs import Job, Sweep, stages
from kdad_dist.sweep.table import write_table

ARRAY, COLLECT = "sweep.sbatch", "collect.sbatch"
PATIENCE = 60.0
"""Seconds that a busy controller may take to say that it is there."""


@dataclass(frozen=True)
class Submission:
    """What SLURM was told, or would be."""

    scripts: dict[str, str] = field(default_factory=dict)
    """Their names and contents."""
    arrays: list[list[str]] = field(default_factory=list)
    """The commands that submit the runs: one, or one for all that wait for the same runs."""
    collect: list[str] = field(default_factory=list)
    """The command that submits the job which writes the table when all have ended."""
    jobs: list[str] = field(default_factory=list)
    """The ids of all of these, none after a dry run."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        if not self.arrays:
            return "every run is done already; --table writes the table"
        if self.jobs:
            *arrays, collect = self.jobs
            named = f"array{'s' * (len(arrays) > 1)} {', '.join(arrays)}"
            return f"submitted: {named}, and {collect} for the table once all have ended"
        lines = [f"# {name}:\n\n{text}" for name, text in self.scripts.items()]
        lines += ["# Submitted by:\n", *map(shlex.join, [*self.arrays, self.collect])]
        return "\n".join(lines)


def submit(sweep: Sweep, at_once: int | None, options: Sequence[str], dry_run: bool) -> Submission:
    """Writes the scripts into the sweep's directory and submits them.

    Every word stands by itself in an argument list, from here to the task: no shell reads a name.

    Args:
        at_once: largest number of tasks of an array under way; None: as many as the cluster gives.
        options: of sbatch, for all jobs.

    Raises:
        DataError: the directory cannot be written.
        UsageError: there is no SLURM here; nothing was written.
        KdadError: no controller answers, and nothing was written; or sbatch refused, in its own
            words.
    """
    left, directory = sweep.left(), sweep.directory
    if not left:
        return Submission()
    scripts = {
        name: (files.shipped("slurm") / name).read_text(encoding="utf-8")
        for name in (ARRAY, COLLECT)
    }
    if not dry_run:
        refuse_without_cluster()
        sweep.write(left)
        write_table(sweep)
        with files.writing(directory):
            for name, text in scripts.items():
                files.write_text(directory / name, text)
    logs = str(directory).replace("%", "%%")  # elsewhere in --output, % is a pattern
    common = ["sbatch", "--parsable", f"--job-name={sweep.base.name}", *options]
    arrays: list[list[str]] = []
    numbers: list[str] = []
    tasks: dict[Path, str] = {}
    for group in groups(left):
        after = [tasks[need.run] for need in group[0].needs if need.run in tasks]
        limited = f"0-{len(group) - 1}" + ("" if at_once is None else f"%{at_once}")
        arrays.append(
            [
                *common,
                f"--output={logs}/slurm-%A_%a.log",
                f"--array={limited}",
                *waiting(after),
                str(directory / ARRAY),
                *(str(job.file) for job in group),
            ]
        )
        numbers.append(f"ARRAY{len(arrays)}" if dry_run else sbatch(arrays[-1]))
        tasks |= {job.run: f"{numbers[-1]}_{i}" for i, job in enumerate(group)}
    collect = [
        *common,
        f"--output={logs}/slurm-%j.log",
        f"--dependency=afterany:{':'.join(numbers)}",
        str(directory / COLLECT),
        str(directory),
    ]
    jobs = [] if dry_run else [*numbers, sbatch(collect)]
    return Submission(scripts, arrays, collect, jobs)


def refuse_without_cluster() -> None:
    """Raises UsageError where there is no sbatch, and KdadError where no controller answers."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "there is no sbatch on this machine",
            "start the same command where there is, as on a login node, or without --slurm",
        )
    sinfo = shutil.which("sinfo")
    if sinfo is None:
        return  # then sbatch alone can tell
    asked = [sinfo, "--noheader"]
    try:
        done = subprocess.run(  # noqa: S603
            asked, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        why = f"sinfo has said nothing for {PATIENCE:g} s"
    else:
        if not done.returncode:
            return
        why = done.stderr.strip().rpartition("\n")[2] or f"sinfo: exit code {done.returncode}"
    raise KdadError(
        f"no SLURM controller is reachable from here ({why})",
        "start the same command again once `sinfo` answers, on a login node if need be, or without "
        "--slurm",
    )


def waiting(after: Sequence[str]) -> list[str]:
    """Options of an array that starts when these tasks have succeeded."""
    if not after:
        return []
    # Without the second, it would stay in the queue for ever when one of them has failed.
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]


def groups(left: Sequence[Job]) -> list[list[Job]]:
    """The jobs that can be one array, since they wait for the same runs; in a possible order."""
    found: dict[tuple[int, frozenset[Path]], list[Job]] = {}
    for number, stage in enumerate(stages(left)):
        for job in stage:
            key = number, frozenset(need.run for need in job.needs)
            found.setdefault(key, []).append(job)
    return list(found.values())


def sbatch(command: Sequence[str]) -> str:
    """The id of the job that this command submits."""
    own = {"KDAD_PYTHON": sys.executable, "KDAD_LAUNCH": str(files.shipped("launch").resolve())}
    done = subprocess.run(  # noqa: S603 (its words one by one, without a shell)
        command, env=own | os.environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise KdadError(
            f"sbatch refused: {done.stderr.strip()}", "give it what it wants with --sbatch=OPTION"
        )
    return done.stdout.strip().partition(";")[0]  # "id;cluster" where there are several
