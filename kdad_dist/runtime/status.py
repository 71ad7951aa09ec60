"""`status.json`: the outcome of a run, for scripts; launchers turn every failure into code 1."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdad_dist import files
from kdad_dist.config.load import CONFIG_FILE
from kdad_dist.errors import Interrupted, Preempted
from kdad_dist.runtime.rundir import STATUS_FILE
from kdad_dist.runtime.together import gathered, lost_peer


class Status:
    """Writes `{state, step, steps, updated, job, reason}`; only the main process does, but for
    failures and interruptions, of which the others may know more.
    """

    def __init__(self, run: Path, steps: int, writes: bool) -> None:
        self.path, self.steps, self.writes, self.step = run / STATUS_FILE, steps, writes, 0
        self.before = files.read_json(self.path)

    def write(self, state: str, reason: str | None = None) -> None:
        if not self.writes:
            return
        files.write_json(
            self.path,
            {
                "state": state,
                "step": self.step,
                "steps": self.steps,
                "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "job": slurm_job(),
                "reason": reason,
            },
        )

    def progress(self) -> None:
        """Notes the step, unless another process has noted a failure meanwhile."""
        if not self.writes:
            return
        with files.in_turn(self.path):
            if not self.has_broken_off():
                self.write("running")

    def has_broken_off(self) -> bool:
        """Whether a process of this launch has noted a failure, or a Ctrl-C. What was there at its
        start is of an earlier one.
        """
        said = files.read_json(self.path)
        broken = said.get("state") == "failed" or said.get("reason") == Interrupted().problem
        return broken and said != self.before

    def has_finished(self) -> bool:
        return files.read_json(self.path).get("state") == "finished"

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Records how the block ends: finished, preempted, or failed with its reason."""
        self.write("running")
        try:
            gathered(None)  # lest "running" replaces what another process writes of its failure
            yield
        except Preempted as error:
            self.write("preempted", error.problem)
            raise
        except BaseException as error:
            self.fail(error)
            raise
        self.write("finished")

    def fail(self, error: BaseException) -> None:
        """Notes a failure, or a Ctrl-C, after which the run goes on from its last checkpoint; who
        only lost another process, or was left by Ctrl-C, leaves that one's word in place.
        """
        lost, left = lost_peer(error), isinstance(error, KeyboardInterrupt)
        if lost and not self.writes:
            return
        state, reason = "failed", f"{type(error).__name__}: {error}"
        if left:
            state, reason = "preempted", Interrupted().problem
        # The disk may be full, which must not hide the error itself.
        with suppress(OSError), files.in_turn(self.path):
            if not ((lost or left) and self.has_broken_off()):
                self.writes = True
                self.write(state, reason)


@contextmanager
def building(run: Path, writes: bool) -> Iterator[None]:
    """Records why a run cannot start, or go on, where its directory holds one already, and that
    it was stopped before it could. A finished one stays finished after a Ctrl-C.

    Collective over the processes, which enter and leave together.
    """
    status = after(run, writes)
    try:
        gathered(None)  # lest the failure of another process counts as what was there before
        yield
        gathered(None)  # lest this one goes on to write "running" over it
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and status.has_finished():
            raise
        if isinstance(error, Preempted):
            status.write("preempted", error.problem)
        elif any((run / name).is_file() for name in (CONFIG_FILE, STATUS_FILE)):
            status.fail(error)
        raise


def after(run: Path, writes: bool) -> Status:
    """The status of a run that got no further than it last said."""
    status = Status(run, 0, writes)
    status.step, status.steps = (status.before.get(name, 0) for name in ("step", "steps"))
    return status


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to, as `squeue` and `scontrol` name it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
