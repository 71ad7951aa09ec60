"""What a terminal shows while something runs."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from kdad_dist.runtime.progress import Progress, columns

NAME = "stfpm-magnetic_tile-with-a-long-name-of-its-own"


def shown(width: int) -> list[str]:
    """The lines of the bar of a training that is half done."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    bar = Bar(*columns(width, "steps"), console=console)
    progress = Progress(bar, NAME, 76000, "steps", done=0)
    progress._started -= 3600
    progress.advance(38000, note="loss 0.4474  16.2 images/s")
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
