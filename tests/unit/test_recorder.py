"""What a training says of its speed, its end and its checkpoints, with a clock at hand."""

import json
import logging
import time
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest
import torch

from kdad_dist.config.data import DataConfig
from kdad_dist.config.run import OptimConfig, RunConfig, TrainConfig
from kdad_dist.runtime import flops, progress, recorder, session
from kdad_dist.runtime.recorder import Recorder
from kdad_dist.runtime.saved import TrainState


class Loader:
    """Seven steps of ten images in an epoch."""

    steps_per_epoch = 7

    def samples_seen(self, step: int) -> int:
        return 10 * step


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@contextmanager
def recording(folder: Path, start: int = 0, steps: int = 1000, log_every: int = 10):
    train = TrainConfig(steps=steps, log_every=log_every)
    config = RunConfig("x", DataConfig("s"), OptimConfig(lr=1), train, output=str(folder))
    with session.start() as here:
        state = TrainState(start, 10 * start)
        record = Recorder(config, here, Loader(), state, steps, operations=2e9)
        with record.recording():
            yield record


def go(record: Recorder, clock: Clock, first: int, last: int, seconds: float = 0.5) -> None:
    """Steps `first` to `last`, each of so many seconds."""
    for done in range(first, last + 1):
        clock.now += seconds
        record.step(done, {"loss": torch.tensor(0.5)}, torch.tensor(1.0), 0.1)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_says_how_much_arithmetic_is_done(tmp_path, clock):
    with recording(tmp_path) as record:
        go(record, clock, 1, 10)
    [line] = lines(tmp_path)
    assert line["images_per_second"] == 20
    assert line["tflops"] == 20 * 2e9 / 1e12
    assert "mfu" not in line


def test_on_a_known_gpu_a_line_says_what_share_of_the_peak_it_is(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(recorder, "peak_of", lambda *_: 4 * 1e11)
    with recording(tmp_path) as record:
        go(record, clock, 1, 10)
    assert lines(tmp_path)[0]["mfu"] == 0.1


def test_the_peak_is_that_of_all_processes_in_the_precision_of_the_run(monkeypatch):
    here = session.Session(None, 0, 4, 4, torch.device("cuda", 0))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    assert recorder.peak_of(here, "bf16") == 4 * flops.PEAKS["L4"]["bf16"] * 1e12
    assert recorder.peak_of(here, "no") == 4 * flops.PEAKS["L4"]["no"] * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Unheard Of")
    assert recorder.peak_of(here, "bf16") is None


def test_a_checkpoint_leaves_a_line_with_the_time_that_training_stood_still(tmp_path, clock):
    with recording(tmp_path) as record:
        go(record, clock, 1, 14)
        with record.saving(14):
            clock.now += 1.25
    assert lines(tmp_path)[-1] == {"step": 14, "epoch": 2.0, "save_seconds": 1.25}


def test_what_is_done_between_two_steps_stands_beside_the_bar(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO, "kdad_dist")
    with recording(tmp_path) as record:
        go(record, clock, 1, 14)
        clock.now += progress.SECONDS_BETWEEN_LINES
        record.held_out(2, 5)
        record.validation(14, 0.5)
        clock.now += progress.SECONDS_BETWEEN_LINES + 1
        with record.saving(14):
            pass
    told = [r.getMessage() for r in caplog.records if "14/1000 steps" in r.getMessage()]
    assert [line.rpartition("left  ")[2] for line in told] == [
        "held-out batch 2 of 5",
        "loss 0.5  20.0 images/s",
    ]


def test_a_log_names_a_first_step_and_a_checkpoint_that_take_long(tmp_path, monkeypatch):
    said: Queue[str] = Queue()
    monkeypatch.setattr(progress.log, "info", lambda text, *words: said.put(text % words))
    monkeypatch.setattr(progress, "draws", lambda: False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with recording(tmp_path) as record:
        assert said.get(timeout=60) == "the first step, which takes a while"
        with record.saving(14):
            assert said.get(timeout=60) == "saving step 14, which takes a while"


def test_a_log_says_once_that_nothing_moves(clock, caplog):
    caplog.set_level(logging.INFO, "kdad_dist")
    bar = progress.Progress(None, "packing", 9, "images", done=0)
    for done in (0, 0, 4, 4, 9):
        clock.now += progress.SECONDS_BETWEEN_LINES + 1
        bar.at(done, 9)
    told = [record.getMessage().split()[1] for record in caplog.records]
    assert told == ["0/9", "4/9", "9/9"]


def test_a_checkpoint_that_failed_leaves_no_line(tmp_path, clock):
    with pytest.raises(OSError), recording(tmp_path) as record, record.saving(1):
        raise OSError
    assert lines(tmp_path) == []


@pytest.mark.parametrize("start", [0, 900])
def test_the_time_that_is_left_is_told_once_and_from_the_pace_of_this_start(
    tmp_path, clock, caplog, start
):
    caplog.set_level(logging.INFO, "kdad_dist")
    with recording(tmp_path, start) as record:
        go(record, clock, start + 1, start + 4, seconds=60)  # a slow start is not held against it
        go(record, clock, start + 5, start + 19, seconds=2)
        assert "to go" not in caplog.text
        go(record, clock, start + 20, start + 60, seconds=2)
    left = {0: "32 min 40 s", 900: "2 min 40 s"}[start]
    [message] = [r.getMessage() for r in caplog.records if "to go" in r.getMessage()]
    assert message.startswith(f"2 s per step, {left} to go for the remaining {1000 - start - 20}")
    assert "peak memory so far" in message


def test_the_time_is_told_however_seldom_lines_are_written(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO, "kdad_dist")
    with recording(tmp_path, log_every=100) as record:
        go(record, clock, 1, 20)
    assert "8 min 10 s to go for the remaining 980" in caplog.text


def test_the_status_file_is_not_written_at_every_line(tmp_path, clock):
    with recording(tmp_path, log_every=1) as record:
        go(record, clock, 1, 1)
        first = (tmp_path / "status.json").stat().st_mtime_ns
        go(record, clock, 2, 8)
        assert (tmp_path / "status.json").stat().st_mtime_ns == first
        go(record, clock, 9, 20)
        assert json.loads((tmp_path / "status.json").read_text())["step"] > 8
