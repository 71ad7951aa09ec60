"""The runs of a sweep as a SLURM array: one task for each run that is not done."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdad_dist import files
from kdad_dist.errors import KdadError, UsageError
from kdad_dist.runtime.rundir import SWEEP_FILE
from kdad_dist.sweep import Sweep

ARRAY, COLLECT = "sweep.sbatch", "collect.sbatch"


@dataclass(frozen=True)
class Submission:
    """What SLURM was told, or would be."""

    script: str
    """The content of the array's script."""
    array: list[str]
    """The command that submits it."""
    collect: list[str]
    """The command that submits the job which writes the table when the array has ended."""
    jobs: list[str]
    """The ids of both, none after a dry run."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        if not self.array:
            return "every run is done already; --table writes the table"
        if self.jobs:
            array, collect = self.jobs
            return f"submitted: array {array}, and {collect} for the table once it has ended"
        return f"{self.script}\n{shlex.join(self.array)}\n{shlex.join(self.collect)}"


def submit(sweep: Sweep, at_once: int | None, options: Sequence[str], dry_run: bool) -> Submission:
    """Writes the scripts into the sweep's directory and submits them.

    Every word stands by itself in an argument list, from here to the task: no shell reads a name.

    Args:
        at_once: largest number of tasks under way; None: as many as the cluster gives.
        options: of sbatch, for both jobs.

    Raises:
        DataError: the directory cannot be written.
        UsageError: there is no sbatch here.
        KdadError: sbatch refused, in its own words.
    """
    left, directory = sweep.left(), sweep.directory
    if not left:
        return Submission("", [], [], [])
    scripts = {
        name: (files.shipped("slurm") / name).read_text(encoding="utf-8")
        for name in (ARRAY, COLLECT)
    }
    limit = "" if at_once is None else f"%{at_once}"
    logs = str(directory).replace("%", "%%")  # elsewhere in --output, % is a pattern
    common = ["sbatch", "--parsable", f"--job-name={sweep.base.name}"]
    array = [
        *common,
        f"--output={logs}/slurm-%A_%a.log",
        f"--array=0-{len(left) - 1}{limit}",
        *options,
        str(directory / ARRAY),
        *(str(job.file) for job in left),
    ]

    def collect(after: str) -> list[str]:
        return [
            *common,
            f"--output={logs}/slurm-%j.log",
            *options,
            f"--dependency=afterany:{after}",
            str(directory / COLLECT),
            str(directory / SWEEP_FILE),
            *(f"--categories={name}" for name in sweep.categories),
            f"--seeds={sweep.seeds}",
        ]

    if dry_run:
        return Submission(scripts[ARRAY], array, collect("ARRAY"), [])
    sweep.write(left)
    with files.writing(directory):
        for name, text in scripts.items():
            files.write_text(directory / name, text)
    first = sbatch(array)
    last = collect(first)
    return Submission(scripts[ARRAY], array, last, [first, sbatch(last)])


def sbatch(command: Sequence[str]) -> str:
    """The id of the job that this command submits."""
    own = {"KDAD_PYTHON": sys.executable, "KDAD_LAUNCH": str(files.shipped("launch").resolve())}
    try:
        done = subprocess.run(  # noqa: S603 (its words one by one, without a shell)
            command, env=own | os.environ, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UsageError(
            "there is no sbatch on this machine",
            "start the same command on a login node, or without --slurm",
        ) from None
    if done.returncode:
        raise KdadError(
            f"sbatch refused: {done.stderr.strip()}", "give it what it wants with --sbatch=OPTION"
        )
    return done.stdout.strip().partition(";")[0]  # "id;cluster" where there are several
