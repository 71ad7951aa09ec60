"""Requests to stop: a handler that only sets a flag, and those who look at it when they can.

Nothing here needs torch, so that a request is heeded from the first moments of a command on.
"""

import ctypes
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from kdad_dist import files
from kdad_dist.errors import Preempted

PREEMPT_FILE = "PREEMPT"
MARK = "stopped.txt"
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER = "TORCHELASTIC_RUN_ID"
"""Stands in the environment of processes that a launcher of torch's has started."""
ECHO = 1.0
"""Seconds, after a Ctrl-C was heard and the person told, in which the launcher may still pass it on
to processes that have had it from the terminal."""
LOOK_EVERY = 0.5
"""Seconds between two looks at the disk, which may be far away."""
Handler = Callable[[int, FrameType | None], None]
"""Of a signal."""
log = logging.getLogger(__name__)


class StopRequest:
    """SIGTERM, SIGUSR1, the file PREEMPT in the run directory, the end of the time budget, or,
    where it is heeded, Ctrl-C.
    """

    def __init__(self, run: Path, max_minutes: float | None = None) -> None:
        """Args:
        max_minutes: from now on.
        """
        self.files = [run / PREEMPT_FILE]
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.reason: str | None = None
        self._end: Handler = signal.default_int_handler
        self._looked, self._said = -math.inf, math.inf

    @contextmanager
    def heeded(self) -> Iterator["StopRequest"]:
        """Meanwhile the signals ask to stop, however often they come."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        outlive_no_launcher()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Meanwhile Ctrl-C asks to stop; a second one ends this process at once, as it does
        elsewhere.
        """
        with interrupts_prevail() as self._end:
            if signal.getsignal(signal.SIGINT) is self._end:
                signal.signal(signal.SIGINT, self._note)
            yield

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = f"received {signal.Signals(number).name}"
        if number == signal.SIGINT:
            self._said = math.inf
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if LAUNCHER in os.environ and time.monotonic() - self._said < ECHO:
            return
        self._end(number, frame)

    def poll(self) -> str | None:
        """Why this process should stop, or None; the first time, it tells the person so."""
        now = time.monotonic()
        if self.reason is None and now - self._looked > LOOK_EVERY:
            self._looked = now
            self.reason = next((said(file) for file in self.files if file.exists()), None)
        if self.reason is None and self.deadline is not None and now > self.deadline:
            self.reason = "train.max_time is over"
        if self.reason is not None and self._said == math.inf:
            self._said = now  # not by the handler, which may come amidst other output
            again = "; Ctrl-C again stops at once" if "SIGINT" in self.reason else ""
            log.info("%s: stopping in order, which may take a few steps%s", self.reason, again)
        return self.reason


@contextmanager
def interrupts_prevail() -> Iterator[Handler]:
    """Ctrl-C ends the block as what it is, even where a library takes it for a failure of its own.

    Half an import fails in ways of its own, and torch's checkpoints catch a Ctrl-C like any error,
    and then wait for processes that have gone: what they raise in the end is another one.

    Yields:
        What ends it so, when it is called by a signal.
    """
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    # A shell has what a script starts in the background ignore a Ctrl-C, which is not meant for it.
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    try:
        yield end
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def outlive_no_launcher() -> None:
    """Has Linux ask this process to stop where the launcher that started it is killed outright.

    It would go on otherwise, unseen, and keep the run directory from whoever starts it again.
    """
    if sys.platform == "linux" and LAUNCHER in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Stop:
    """A request to stop amid work that shares no step, passed on to the other processes by a file.

    So each learns of it between two pieces of its own work, however long the others take, and no
    process waits for another one to ask.
    """

    def __init__(self, request: StopRequest, folder: Path, work: str, again: str) -> None:
        """Args:
        folder: that all processes see; the file in it is of an earlier command if it lies there
            already, and whoever makes the folder removes it.
        work: that is stopped, in words.
        again: what becomes of it when the same command is started again.
        """
        self.request, self.mark, self.work, self.again = request, folder / MARK, work, again
        self.over = False
        """Whether that work is done: what is left of it in other threads goes on."""
        request.files.append(self.mark)

    def check(self) -> None:
        """Called between two pieces of work.

        Raises:
            Preempted: this process, or another one of the launch, was asked to stop.
        """
        if self.over or (reason := self.request.poll()) is None:
            return
        with suppress(OSError):  # where nothing can be written, the others learn of it at the end
            files.write_text(self.mark, reason)
        raise Preempted(
            f"{self.work} stopped before it was done: {reason}",
            f"start the same command again, which {self.again}",
        )


def said(file: Path) -> str:
    """The request that a file makes, which may be empty."""
    with suppress(OSError):
        return file.read_text(encoding="utf-8").strip() or f"found {file}"
    return f"found {file}"


def forget_requests(run: Path) -> None:
    """Removes requests that were made of an earlier command."""
    for name in (PREEMPT_FILE, MARK):
        request = run / name
        if request.exists():  # on a read-only disk, removing what is not there is an error too
            request.unlink(missing_ok=True)
