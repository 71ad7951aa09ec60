"""What a person sees while something runs: a bar on a terminal, plain lines in a log."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Timer

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bar

from kdad_dist.wording import duration, on_one_line, printable

log = logging.getLogger(__name__)
CONSOLE = Console(stderr=True)
SECONDS_BETWEEN_LINES = 15
PATIENCE = 2.0
"""Seconds for which a person waits without being told for what."""
ONE = Lock()
"""Held by the bar that is shown: what goes on within its work counts in lines, as in a log."""
WIDE = 100
"""Columns of a terminal that holds a whole bar with everything that is said beside it."""


class Line(logging.Formatter):
    """What is logged may name files, which must not steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def draws() -> bool:
    """Whether lines can be drawn over: not in a file whose colours are forced (FORCE_COLOR), nor on
    a terminal that knows no more than text.
    """
    return CONSOLE.is_terminal and not CONSOLE.is_dumb_terminal and CONSOLE.file.isatty()


def log_to_stderr() -> None:
    """Sends the package's messages to stderr, in colour on a terminal: of the first process of a
    launch all, of the others errors.
    """
    handler: logging.Handler
    if draws():
        handler = RichHandler(console=CONSOLE, show_path=False, show_time=False, show_level=False)
        handler.setFormatter(Line("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Line("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("kdad_dist")
    logger.handlers = [handler]
    first = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    logger.setLevel(logging.INFO if first else logging.ERROR)
    logger.propagate = False


class Progress:
    """Counts work of a known length and says how fast it goes and when it will be done."""

    def __init__(self, bar: Bar | None, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = on_one_line(title), total, unit, done
        self._first, self._started = done, time.monotonic()
        self._counted = self._said = self._started
        self._told: tuple[int, str] | None = None
        self._bar = bar
        self._task = bar.add_task(self.title, total=total, completed=done, note="") if bar else None

    def seconds_left(self) -> float | None:
        """From the pace since this start, so that it is right after a resume; None: not known, or
        over while the next one is still to come.
        """
        progressed, elapsed = self.done - self._first, self._counted - self._started
        if not progressed:
            return None
        foreseen = (self.total - self.done) * elapsed / progressed
        left = foreseen - (time.monotonic() - self._counted)
        return left if left >= 0 else None

    def at(self, done: int, total: int) -> None:
        """For work whose length is only known once it has begun."""
        self.total = total
        self.advance(done - self.done)

    def advance(self, count: int = 1, note: str = "") -> None:
        if count:
            self.done, self._counted = self.done + count, time.monotonic()
        left = self.seconds_left()
        eta = f"{duration(left)} left" if left is not None else ""
        text = "  ".join(part for part in (eta, note) if part)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, note=text)
            if time.monotonic() - self._started > PATIENCE:
                self._bar.start()  # does nothing where it was
        elif (
            time.monotonic() - self._said > SECONDS_BETWEEN_LINES
            and (self.done, note) != self._told  # what stands still is said once
        ):
            self._said, self._told = time.monotonic(), (self.done, note)
            log.info("%s: %d/%d %s  %s", self.title, self.done, self.total, self.unit, text)

    @contextmanager
    def beside(self, work: str) -> Iterator[None]:
        """Says what goes on while nothing is counted: in the bar, in a log once it takes long."""
        if self._bar is None:
            with uncounted(work):
                yield
        else:
            self.advance(0, work)
            yield


@contextmanager
def progress(
    title: str,
    total: int,
    unit: str = "",
    done: int = 0,
    visible: bool = True,
    brief: bool = False,
) -> Iterator[Progress]:
    """A progress display for the main process of a launch; others count in silence.

    Args:
        brief: it comes into sight once the work takes long, and goes when that is done.
    """
    if not (visible and draws() and ONE.acquire(blocking=False)):
        shown = Progress(None, title, total, unit, done)
        if not visible:
            shown._said = float("inf")
        yield shown
        return
    bar = Bar(*columns(CONSOLE.width, unit), console=CONSOLE, transient=brief)
    try:
        if not brief:
            bar.start()
        yield Progress(bar, title, total, unit, done)
    finally:
        bar.stop()
        ONE.release()


@contextmanager
def uncounted(work: str) -> Iterator[None]:
    """Says what is under way once it takes long: of this, nobody knows how far it is."""
    said = Timer(
        PATIENCE if draws() else SECONDS_BETWEEN_LINES,
        log.info,
        ["%s, which takes a while", on_one_line(work)],
    )
    said.daemon = True  # Ctrl-C waits for nobody
    said.start()
    try:
        yield
    finally:
        said.cancel()


def columns(width: int, unit: str) -> list[ProgressColumn]:
    """What stands in the line, the most important first: a narrow terminal cuts off its end, since
    a line that wraps is repeated all over the screen.
    """
    said = "{task.completed}/{task.total} " + unit + "  {task.fields[note]}"
    if width >= WIDE:
        title = TextColumn("{task.description:.40}", markup=False)
        return [title, BarColumn(), TextColumn(said, markup=False)]
    return [TextColumn("{task.description:.16}  " + said, markup=False)]
