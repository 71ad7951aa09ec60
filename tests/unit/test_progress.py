"""What a terminal shows while something runs."""

import io
import logging
import sys
import threading
from queue import Queue

import pytest
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.text import Text

from kdad_dist.models.weights import tensors_hash
from kdad_dist.runtime import progress
from kdad_dist.runtime.identity import shown_hash
from kdad_dist.runtime.progress import Progress, columns, log_to_stderr

NAME = "stfpm-magnetic_tile-with-a-long-name-of-its-own"


def shown(width: int, name: str = NAME) -> list[str]:
    """The lines of the bar of a training that is half done."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    bar = Bar(*columns(width, "steps"), console=console)
    training = Progress(bar, name, 76000, "steps", done=0)
    training._started -= 3600
    training.advance(38000, note="loss 0.4474  16.2 images/s")
    lines = console.render_lines(bar.get_renderable(), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 99, 100, 120, 200])
def test_a_bar_is_one_line_on_a_terminal_of_any_width(width):
    [line] = shown(width)
    assert len(line) <= width
    assert line.startswith("stfpm-magnetic_t")


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_how_far_it_is_and_how_long_it_takes_come_first(width):
    [line] = shown(width)
    assert "38000/76000 steps" in line
    assert "1 h 0 min left" in line


def test_a_terminal_of_80_columns_shows_loss_and_pace_too():
    [line] = shown(80)
    assert line.endswith("loss 0.4474  16.2 images/s")


def test_what_is_left_shrinks_while_one_waits_and_is_not_told_once_that_is_over(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    runs = Progress(None, "many", 5, "runs", done=1)
    assert runs.seconds_left() is None
    now += 600
    runs.advance()
    assert runs.seconds_left() == 1800
    for waited, left in ((600, 1200), (1200, 0), (1, None)):
        now += waited
        runs.advance(0)
        assert runs.seconds_left() == left
    runs.advance(3)
    assert runs.seconds_left() == 0


@pytest.mark.parametrize("width", [80, 200])
def test_a_name_is_no_markup_and_steers_nothing(width):
    [line] = shown(width, "[/b]a[red]\x1b[2J\n")
    assert line.startswith(r"[/b]a[red]\x1b[")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    screen = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "CONSOLE", Console(file=screen, width=80))
    return screen


def test_what_is_brief_comes_into_sight_when_it_takes_long_and_goes_when_it_is_done(terminal):
    with progress.progress("hashing", 3, "files", brief=True) as bar:
        bar.advance()
        assert terminal.getvalue() == ""
        bar._started -= progress.PATIENCE
        bar.advance()
        assert "hashing" in terminal.getvalue() and "2/3 files" in terminal.getvalue()
        with progress.progress("reading", 9, "files") as inner:  # a terminal has room for one
            inner.advance()
        assert "reading" not in terminal.getvalue()
    erased = "\x1b[2K"
    assert terminal.getvalue().rstrip("\n").endswith(erased)
    with progress.progress("reading", 9, "files") as bar:
        bar.advance()
    assert "1/9 files" in terminal.getvalue().rpartition(erased)[2]


@pytest.mark.parametrize(
    ("isatty", "variables"), [(False, {"FORCE_COLOR": "1"}), (True, {"TERM": "dumb"})]
)
def test_where_nothing_can_be_drawn_over_there_are_lines(monkeypatch, terminal, isatty, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Terminal() if isatty else io.StringIO()
    monkeypatch.setattr(progress, "CONSOLE", Console(file=screen, width=80))
    with progress.progress("hashing", 3, "files") as bar:
        bar.advance()
    assert screen.getvalue() == ""


def test_large_weights_are_seen_to_be_hashed(monkeypatch, terminal):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    assert shown_hash(tensors, "the teacher") == tensors_hash(tensors)
    assert "hashing the teac  2/2 tensors" in terminal.getvalue()


@pytest.mark.parametrize(("draws", "limit"), [(True, "PATIENCE"), (False, "SECONDS_BETWEEN_LINES")])
def test_what_cannot_be_counted_is_named_once_it_takes_long(monkeypatch, terminal, draws, limit):
    said: Queue[str] = Queue()
    monkeypatch.setattr(progress.log, "info", lambda text, *words: said.put(text % words))
    monkeypatch.setattr(progress, "draws", lambda: draws)
    monkeypatch.setattr(progress, limit, 1000)
    with progress.uncounted("tracing"):
        timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
        [waiting] = [timer for timer in timers if "tracing" in timer.args]
        assert waiting.interval == 1000
    waiting.join(60)
    assert not waiting.is_alive() and said.empty()
    monkeypatch.setattr(progress, limit, 0)
    with progress.uncounted("tracing"):
        assert said.get(timeout=60) == "tracing, which takes a while"


@pytest.mark.parametrize("draws", [True, False])
def test_what_is_logged_of_a_file_steers_no_terminal(monkeypatch, draws):
    screen = Terminal() if draws else io.StringIO()
    monkeypatch.setattr(progress, "CONSOLE", Console(file=screen))
    monkeypatch.setattr(sys, "stderr", screen)
    package = logging.getLogger("kdad_dist")
    monkeypatch.setattr(package, "handlers", [])
    log_to_stderr()
    logging.getLogger("kdad_dist.data").warning("skipped: %s", "[/b]\x1b[2J.png")
    assert r"[/b]\x1b[2J.png" in Text.from_ansi(screen.getvalue()).plain
    assert "\x1b[2J" not in screen.getvalue()


@pytest.mark.parametrize(
    ("launched", "said"),
    [
        ({}, "note\nfailure\n"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "note\nfailure\n"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "failure\n"),
        ({"RANK": "3"}, "note\nfailure\n"),  # that of something else
    ],
)
def test_of_a_launch_one_process_tells_what_goes_on_and_each_what_went_wrong(
    monkeypatch, capsys, launched, said
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    package = logging.getLogger("kdad_dist")
    monkeypatch.setattr(package, "handlers", [])
    level, passes = package.level, package.propagate
    try:
        log_to_stderr()
        progress.log.info("note")
        progress.log.error("failure")
    finally:
        package.setLevel(level)
        package.propagate = passes
    lines = capsys.readouterr().err.splitlines()
    assert "".join(f"{line.partition(' ')[2]}\n" for line in lines) == said
