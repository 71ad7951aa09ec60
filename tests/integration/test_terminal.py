"""What a person sees of `kdad` on a terminal, and what Ctrl-C does there."""

import json
from pathlib import Path

import pytest

from kdad_dist.errors import Interrupted, Preempted, UsageError
from kdad_dist.files import write_json
from tests.helpers import make_mvtec
from tests.kdad import Launched
from tests.sweeps import many
from tests.terminal import COLOUR, Terminal, on_terminal

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

    script = 'until [ -s "$0" ]; do sleep 0.05; done; exit $(cat "$0")'
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


def look_often() -> None:
    on_terminal()
    from kdad_dist.status import text

    text.EVERY = 0.05


def test_a_watch_fits_the_screen_and_leaves_the_whole_list_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(60):
        state = {7: "failed", 55: "preempted"}.get(number, "finished")
        note(tmp_path / f"runs/{number:02}", state, number)
    terminal = Terminal(monkeypatch, height=40)
    watch = Launched(["status", "--watch"], 1, look_often)

    def seen(first: str, last: str) -> list[str]:
        return terminal.until(
            watch, lambda lines: (lines[0], lines[-1]) == (f"60 runs: {first}", f"and {last}")
        )

    rest = "more, for which there is no room:"
    lines = seen("1 failed, 1 preempted, 58 finished", f"24 {rest} 24 finished")
    assert len(lines) == 40, "it fills the screen, and no line has left it"
    assert [line for line in lines if "no disk" in line] == ["    DataError: no disk"]
    note(tmp_path / "runs/59", "failed", 59)
    lines = seen("2 failed, 1 preempted, 57 finished", f"25 {rest} 25 finished")
    assert len(lines) == 40 and lines.count("    DataError: no disk") == 2
    terminal.press("\x03")
    outcome = watch.wait()
    terminal.close()
    assert outcome.codes == [Interrupted.exit_code], terminal.text[-2000:]
    lines = terminal.lines()
    assert not any("no room" in line or line.strip() == "..." for line in lines), lines
    for number in range(60):
        assert len([line for line in lines if f" runs/{number:02} " in line]) == 1, lines


def note(run: Path, state: str, step: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    reason = "DataError: no disk" if state == "failed" else None
    said = {"state": state, "step": step, "steps": 99, "reason": reason}
    write_json(run / "status.json", said)


@pytest.mark.parametrize(
    ("words", "meant", "refused"),
    [
        (["trian"], "train", ""),
        (["trian"], "train", "1"),
        (["status", "--verfy"], "--verify", "1"),
    ],
)
def test_a_slip_of_the_finger_is_answered_without_colours_where_these_are_refused(
    monkeypatch, words, meant, refused
):
    terminal = Terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", refused)
    outcome = Launched(words, 1, on_terminal).wait()
    terminal.close()
    assert outcome.codes == [UsageError.exit_code]
    assert meant in " ".join(terminal.lines()), terminal.text
    assert bool(COLOUR.search(terminal.text)) == (not refused), terminal.text
