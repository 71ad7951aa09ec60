"""Requests to stop work that shares no step: scoring, whose processes never wait for each other."""

from pathlib import Path

from kdad_dist import files
from kdad_dist.errors import Preempted
from kdad_dist.runtime.preemption import PREEMPT_FILE, StopRequest

MARK = "stopped.txt"


def forget_requests(run: Path) -> None:
    """Removes a request that was made of an earlier command."""
    request = run / PREEMPT_FILE
    if request.exists():  # on a read-only disk, removing what is not there is an error too
        request.unlink(missing_ok=True)


class Stop:
    """A request to stop, passed on to the other processes through the folder that all of them fill.

    So each learns of it between two units of work, however many are left to it, and no process
    waits for another one to ask.
    """

    def __init__(self, run: Path, partial: Path) -> None:
        self.request, self.mark = StopRequest(run), partial / MARK

    def check(self) -> None:
        """Called between two units of work.

        Raises:
            Preempted: this process, or another one of the launch, was asked to stop.
        """
        reason = self.request.poll()
        if self.mark.is_file():
            reason = self.mark.read_text(encoding="utf-8")
        elif reason is not None:
            files.write_text(self.mark, reason)
        if reason is not None:
            raise Preempted(
                f"scoring stopped before it was done: {reason}; what it had written is gone",
                "start the same command again, which begins anew",
            )
