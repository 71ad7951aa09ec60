"""Requests to stop, and flags on which all processes agree without a step ever waiting.

A handler only sets a flag. Every `check_every` steps the flags of all processes are reduced in the
background, and read when the next such step comes: all processes read the same answer at the same
step, and none waited for it.
"""

import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

PREEMPT_FILE = "PREEMPT"


class StopRequest:
    """SIGTERM, SIGUSR1, the file PREEMPT in the run directory, or the end of the time budget."""

    def __init__(self, run: Path, max_minutes: float | None = None) -> None:
        self.file = run / PREEMPT_FILE
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = f"received {signal.Signals(number).name}"

    def poll(self) -> str | None:
        """Why this process should stop, or None."""
        if self.reason is None and self.file.exists():
            self.reason = f"found {self.file}"
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.max_time is over"
        return self.reason


class Agreement:
    """The first non-finite step and the wish to stop, as all processes see them."""

    NONE = -1.0

    def __init__(self, device: torch.device, every: int) -> None:
        self.every = every
        self._first_bad = torch.full((), self.NONE, device=device, dtype=torch.float64)
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def note(self, step: int, finite: Tensor) -> None:
        """Remembers on the device that the update of `step` was not finite."""
        bad_now = ~finite & (self._first_bad < 0)
        self._first_bad = torch.where(bad_now, float(step), self._first_bad)

    def check(self, step: int, stop: bool) -> tuple[int | None, bool]:
        """At every `every`-th step: what was agreed at the previous one; else nothing."""
        if (step + 1) % self.every:
            return None, False
        answer = self._read()
        self._post(stop)
        return answer

    def settle(self, stop: bool = False) -> tuple[int | None, bool]:
        """Waits for the newest agreement: before a checkpoint, and at the end."""
        earlier = self._read()
        self._post(stop)
        bad, now = self._read()
        return (earlier[0] if bad is None else bad), earlier[1] or now

    def _post(self, stop: bool) -> None:
        wish = torch.full_like(self._first_bad, float(stop))
        flags = torch.stack([self._first_bad, wish])
        work = None
        if dist.is_initialized():
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = flags, work

    def _read(self) -> tuple[int | None, bool]:
        if self._pending is None:
            return None, False
        flags, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        first_bad, stop = flags.tolist()
        return (None if first_bad < 0 else int(first_bad)), bool(stop)
