"""`status.json`: the outcome of a run, for scripts; launchers turn every failure into code 1."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdad_dist.errors import Preempted
from kdad_dist.runtime import files
from kdad_dist.runtime.together import lost_peer


class Status:
    """Writes `{state, step, steps, updated, reason}`; only the main process does, but for failures,
    of which the others may know more.
    """

    def __init__(self, run: Path, steps: int, writes: bool) -> None:
        self.path, self.steps, self.writes, self.step = run / "status.json", steps, writes, 0

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
                "reason": reason,
            },
        )

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Records how the block ends: finished, preempted, or failed with its reason."""
        self.write("running")
        try:
            yield
        except Preempted as error:
            self.write("preempted", error.problem)
            raise
        except BaseException as error:
            self._fail(error)
            raise
        self.write("finished")

    def _fail(self, error: BaseException) -> None:
        """Notes a failure; who only lost another process leaves that one's word in place."""
        if lost_peer(error) and (not self.writes or self._state() == "failed"):
            return
        self.writes = True
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the disk may be full, which must not hide the error itself
            self.write("failed", reason)

    def _state(self) -> str:
        return json.loads(self.path.read_bytes())["state"]
