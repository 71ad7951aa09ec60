"""What a terminal shows while something runs."""

import io
import logging
import sys

import pytest
from rich.console import Console
from rich.progress import Progress as Bar
from rich.text import Text

from kdad_dist.runtime import progress
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


@pytest.mark.parametrize("width", [80, 200])
def test_a_name_is_no_markup_and_steers_nothing(width):
    [line] = shown(width, "[/b]a[red]\x1b[2J\n")
    assert line.startswith(r"[/b]a[red]\x1b[")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_logged_of_a_file_steers_no_terminal(monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "CONSOLE", Console(file=screen, force_terminal=terminal))
    monkeypatch.setattr(sys, "stderr", screen)
    package = logging.getLogger("kdad_dist")
    monkeypatch.setattr(package, "handlers", [])
    log_to_stderr()
    logging.getLogger("kdad_dist.data").warning("skipped: %s", "[/b]\x1b[2J.png")
    assert r"[/b]\x1b[2J.png" in Text.from_ansi(screen.getvalue()).plain
    assert "\x1b[2J" not in screen.getvalue()
