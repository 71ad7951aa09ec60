"""The outcome of a run, as scripts read it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from kdad_dist import files
from kdad_dist.errors import CheckpointError, DataError, Preempted
from kdad_dist.runtime import status
from kdad_dist.runtime.status import Status, building


def state(run: Path) -> tuple[str, str | None]:
    found = json.loads((run / "status.json").read_text())
    return found["state"], found["reason"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, ("finished", None)),
        (Preempted("asked to stop", "go on"), ("preempted", "asked to stop")),
        (KeyboardInterrupt(), ("preempted", "interrupted")),
        (RuntimeError("odd"), ("failed", "RuntimeError: odd")),
    ],
)
def test_every_end_is_noted(tmp_path, error, said):
    with (
        suppress(Preempted, KeyboardInterrupt, RuntimeError),
        Status(tmp_path, 3, writes=True).outcome(),
    ):
        assert state(tmp_path) == ("running", None)
        if error:
            raise error
    assert state(tmp_path) == said


@pytest.mark.parametrize("writes", [True, False])
def test_a_full_disk_does_not_hide_the_error_that_it_caused(tmp_path, monkeypatch, writes):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        Status(tmp_path, 3, writes).outcome(),
    ):
        monkeypatch.setattr(os, "fsync", full)
        raise CheckpointError("the checkpoint cannot be written", "make room")
    assert not list(tmp_path.glob(".*.tmp"))


def fail_to_build(run: Path) -> None:
    with pytest.raises(DataError), building(run, writes=True):
        raise DataError("the shards are gone", "bring them back")


@pytest.mark.parametrize("before", [None, "half a", "[]", '{"state": "running", "step": 3}'])
def test_a_run_that_cannot_go_on_says_why(tmp_path, before):
    (tmp_path / "config.yaml").touch()
    if before:
        (tmp_path / "status.json").write_text(before)
    fail_to_build(tmp_path)
    kind, reason = state(tmp_path)
    assert kind == "failed"
    assert "the shards are gone" in (reason or "")
    step = json.loads((tmp_path / "status.json").read_text())["step"]
    assert step == (3 if before and "step" in before else 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [("finished", ("finished", None)), ("failed", ("preempted", "interrupted"))],
)
def test_a_start_that_is_left_by_ctrl_c_takes_nothing_back(tmp_path, before, after):
    Status(tmp_path, 3, writes=True).write(before)
    with pytest.raises(KeyboardInterrupt), building(tmp_path, writes=True):
        raise KeyboardInterrupt
    assert state(tmp_path) == after


def test_what_never_became_a_run_has_no_outcome(tmp_path):
    fail_to_build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("image 3 is damaged", "pack again"), ("failed", "image 3 is damaged")),
        (KeyboardInterrupt(), ("preempted", "interrupted")),
    ],
)
def test_what_another_process_died_of_is_not_overwritten(tmp_path, error, said):
    main, other = Status(tmp_path, 9, writes=True), Status(tmp_path, 9, writes=False)
    with pytest.raises(RuntimeError), main.outcome():
        other.fail(error)
        main.progress()
        raise RuntimeError(
            "[third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed by peer"
        )
    assert state(tmp_path)[0] == said[0]
    assert said[1] in (state(tmp_path)[1] or "")


def test_ctrl_c_does_not_hide_what_another_process_died_of(tmp_path):
    other = Status(tmp_path, 9, writes=False)
    with pytest.raises(KeyboardInterrupt), Status(tmp_path, 9, writes=True).outcome():
        other.fail(DataError("image 3 is damaged", "pack again"))
        raise KeyboardInterrupt
    assert "image 3 is damaged" in (state(tmp_path)[1] or "")


@pytest.mark.parametrize("meeting", [1, 2])
def test_what_another_process_dies_of_stays_if_this_one_comes_late_to_build_or_to_train(
    tmp_path, monkeypatch, meeting
):
    Status(tmp_path, 9, writes=True).fail(DataError("of before", "mend it"))
    other, waits = Status(tmp_path, 9, writes=False), []

    def wait_in_vain(value: None) -> None:
        waits.append(value)
        if len(waits) == meeting:
            other.fail(DataError("image 3 is damaged", "pack again"))
            raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed")

    monkeypatch.setattr(status, "gathered", wait_in_vain)
    with pytest.raises(RuntimeError), building(tmp_path, writes=True):
        pass
    assert "image 3 is damaged" in (state(tmp_path)[1] or "")


@pytest.mark.parametrize("before", [KeyboardInterrupt(), DataError("of before", "mend it")])
def test_how_an_earlier_launch_ended_does_not_hide_that_this_one_cannot_start(tmp_path, before):
    Status(tmp_path, 9, writes=True).fail(before)
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError), building(tmp_path, writes=True):
        raise lost
    assert state(tmp_path) == ("failed", f"RuntimeError: {lost}")


def test_a_failure_noted_while_the_step_is_noted_stays(tmp_path, monkeypatch):
    main, other = Status(tmp_path, 9, writes=True), Status(tmp_path, 9, writes=False)
    failing = Thread(target=other.fail, args=[DataError("image 3 is damaged", "pack again")])
    read = files.read_json

    def read_and_dawdle(path: Path) -> dict:
        found = read(path)
        failing.start()
        failing.join(0.3)
        return found

    main.write("running")
    monkeypatch.setattr(files, "read_json", read_and_dawdle)
    main.progress()
    failing.join()
    assert "image 3 is damaged" in (state(tmp_path)[1] or "")
