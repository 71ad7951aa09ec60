"""Requests to stop, and flags on which all processes agree without a step ever waiting.

A handler only sets a flag. Every `check_every` steps the flags of all processes are reduced in the
background, and read when the next such step comes: all processes read the same answer at the same
step, and none waited for it.
"""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

PREEMPT_FILE = "PREEMPT"
log = logging.getLogger(__name__)


class StopRequest:
    """SIGTERM, SIGUSR1, the file PREEMPT in the run directory, the end of the time budget, or,
    where it is heeded, Ctrl-C.
    """

    def __init__(self, run: Path, max_minutes: float | None = None) -> None:
        self.file = run / PREEMPT_FILE
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.reason: str | None = None
        self._said = self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Meanwhile Ctrl-C asks to stop; a second one ends this process at once, as it does
        elsewhere.
        """
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        except Exception as error:
            # torch's checkpoints catch a Ctrl-C like any failure, and then wait for processes
            # that have gone: what they raise in the end is another error.
            if self._interrupted:
                raise KeyboardInterrupt from error
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = f"received {signal.Signals(number).name}"
        if number == signal.SIGINT:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.default_int_handler(number, frame)

    def poll(self) -> str | None:
        """Why this process should stop, or None; the first time, it tells the person so."""
        if self.reason is None and self.file.exists():
            self.reason = f"found {self.file}"
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.max_time is over"
        if self.reason is not None and not self._said:
            self._said = True  # not by the handler, which may come amidst other output
            again = "; Ctrl-C again stops at once" if "SIGINT" in self.reason else ""
            log.info("%s: stopping in order, which may take a few steps%s", self.reason, again)
        return self.reason


@dataclass(frozen=True)
class Verdict:
    """What all processes agreed on."""

    first_bad: int | None = None
    """The first step whose update was not finite (and was not applied)."""
    stop: bool = False
    save: bool = False

    def also(self, later: "Verdict") -> "Verdict":
        """Both together."""
        first_bad = later.first_bad if self.first_bad is None else self.first_bad
        return Verdict(first_bad, self.stop or later.stop, self.save or later.save)


class Agreement:
    """Flags that any process may raise and that all of them read at the same step."""

    def __init__(self, device: torch.device, every: int) -> None:
        self.every = every
        self._first_bad = torch.full((), -1.0, device=device, dtype=torch.float64)
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def note(self, step: int, finite: Tensor) -> None:
        """Remembers on the device whether the update of `step` was finite."""
        first = ~finite & (self._first_bad < 0)
        self._first_bad = torch.where(first, float(step), self._first_bad)

    def check(self, step: int, stop: bool, save: bool) -> Verdict:
        """At every `every`-th step, what was agreed at the one before; at others nothing."""
        if step % self.every:
            return Verdict()
        verdict = self._read()
        self._post(stop, save)
        return verdict

    def settle(self) -> Verdict:
        """Waits until everything up to now is agreed: before a checkpoint, and at the end."""
        earlier = self._read()
        self._post(stop=False, save=False)
        return earlier.also(self._read())

    def _post(self, stop: bool, save: bool) -> None:
        wishes = torch.tensor([stop, save], dtype=torch.float64)
        flags = torch.cat([self._first_bad[None], wishes.to(self._first_bad.device)])
        work = None
        if dist.is_initialized():
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = flags, work

    def _read(self) -> Verdict:
        if self._pending is None:
            return Verdict()
        flags, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        first_bad, stop, save = flags.tolist()
        return Verdict(None if first_bad < 0 else int(first_bad), bool(stop), bool(save))
