"""What a person sees of `kdad` on a terminal, and what Ctrl-C does there."""

import json

import pytest

from kdad_dist.errors import Preempted
from tests.helpers import make_mvtec
from tests.kdad import Launched
from tests.sweeps import many
from tests.terminal import Terminal, on_terminal

pytestmark = pytest.mark.launch


def test_a_bar_is_drawn_and_the_document_alone_stands_on_stdout(tmp_path, monkeypatch):
    root, terminal = make_mvtec(tmp_path / "images", train=6), Terminal(monkeypatch)
    words = ["pack", root, tmp_path / "shards", "--size", 32, "--json"]
    outcome = Launched(words, 1, on_terminal).wait()
    terminal.close()
    images = json.loads(outcome.text.partition("]\n")[2])["images"]
    assert any(f"packing  {images}/{images} images" in line for line in terminal.lines())
    assert "\x1b[?25l" in terminal.text


def wait_for_leave() -> None:
    """On a terminal; the runs of a sweep do nothing until the test lets them, and then fail or not,
    as it says.
    """
    on_terminal()
    from kdad_dist.sweep import local

    script = 'until [ -e "$0" ]; do sleep 0.05; done; exit $(cat "$0")'
    local.commands = lambda job: {"train": ["sh", "-c", script, f"{job.run}.leave"]}


def test_a_sweep_counts_its_runs_below_what_it_says_and_is_left_by_ctrl_c(tmp_path, monkeypatch):
    config, terminal = many(tmp_path, "abc", train={"steps": 2}), Terminal(monkeypatch)
    sweep = Launched(["sweep", config], 1, wait_for_leave)

    def seen(said: str, bar: str, note: str = "") -> None:
        terminal.until(
            sweep,
            lambda lines: said in lines and lines[-1].startswith(bar) and lines[-1].endswith(note),
        )

    seen("a: train", "many  0/3 runs")
    (tmp_path / "many/a.leave").write_text("0")
    seen("b: train", "many  1/3 runs")
    (tmp_path / "many/b.leave").write_text("1")
    seen("c: train", "many  2/3 runs", "1 failed")
    terminal.press("\x03")
    outcome = sweep.wait()
    terminal.close()
    assert outcome.codes == [Preempted.exit_code], terminal.text
    lines = terminal.lines()
    for said in ("0 of 3 runs are done", "a: train", "a: done", "b: train", "c: train"):
        assert lines.count(said) == 1, lines
    assert any("received SIGINT: stopping in order" in line for line in lines)
    assert "c: stopped, to go on later" in lines
    assert "kdad: the sweep was stopped with 3 of 3 runs to go" in lines
    assert len([line for line in lines if "/3 runs" in line]) == 1, lines
    assert "\x1b[?25h" in terminal.text.rpartition("\x1b[?25l")[2], "the cursor is there again"
