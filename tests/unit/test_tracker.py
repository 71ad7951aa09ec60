"""`metrics.jsonl` is right whatever happens; other trackers hold each step once, and do no harm."""

import importlib.util
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from kdad_dist.config.load import load
from kdad_dist.config.run import RunConfig, TrackConfig
from kdad_dist.errors import UsageError
from kdad_dist.runtime import session, tracker
from kdad_dist.runtime.tracker import Tracker, check_trackers
from tests.launcher import start, wait_for

SECRET = "5ec2e7" * 6 + "0000"


def config(folder: Path, **track: object) -> RunConfig:
    text = {
        "name": "x",
        "output": str(folder),
        "data": {"shards": "s"},
        "optim": {"lr": 1},
        "train": {"steps": 1},
        "track": track,
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(text))
    return load(folder / "x.yaml")


@contextmanager
def tracking(folder: Path, start: int, **track: object) -> Iterator[Tracker]:
    with session.start() as here:
        yield Tracker(folder, here, config(folder, **track), start)


def write(into: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        into.write({"step": step, "loss": 1 / step})


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def tracked(folder: Path) -> list[list[int]]:
    """The steps in each part of the W&B run, in the order in which the parts begin."""
    from tests.wandb_file import read_history

    parts = [read_history(part) for part in (folder / "wandb").glob("offline-run-*")]
    return sorted([int(row["_step"]) for row in part] for part in parts)


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".wandb.*"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


# ---- metrics.jsonl -------------------------------------------------------------------------------


def test_lines_are_json_whatever_the_numbers(tmp_path):
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with tracking(tmp_path, 0) as into:
        into.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
        into.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(line, parse_constant=no_constant)
    assert found == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


@pytest.mark.parametrize("torn", [b'{"st', b'{"step": 4, "loss": 0.2', b"\0" * 40, b"\xff\xfe{"])
def test_a_resumed_run_drops_later_lines_and_a_line_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + torn)
    with tracking(tmp_path, 2) as into:
        write(into, 3, 3)
        into.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.3333333333333333}\n'


def test_where_nothing_is_taken_again_the_file_is_only_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat().st_ino
    with tracking(tmp_path, 2) as into:
        write(into, 3, 3)
        into.close()
    assert path.stat().st_ino == before
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_get_it(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    track = {"wandb": TrackConfig(wandb="offline"), "tensorboard": TrackConfig(tensorboard=True)}
    with pytest.raises(UsageError, match=f"package {name} is not installed") as error:
        check_trackers(track[name])
    assert f"pip install 'kdad_dist[{name}]'" in error.value.remedy


# ---- Weights & Biases ----------------------------------------------------------------------------


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()  # lest processes of other tests use its service


def test_parts_of_a_run_carry_one_id_and_never_overlap(no_key, tmp_path):
    with tracking(tmp_path, 0, wandb="offline") as into:
        write(into, 1, 700)  # several blocks of the file
        into.close()
    with tracking(tmp_path, 690, wandb="offline") as into:  # the newest checkpoint was damaged
        write(into, 691, 710)
        into.write({"step": 710, "val_loss": 0.25})
        into.close()
    assert tracked(tmp_path) == [[*range(1, 701)], [*range(701, 711)]]
    identity = (tmp_path / "wandb_id").read_text()
    assert all(identity in p.name for p in (tmp_path / "wandb").iterdir())
    assert not leftovers(tmp_path)


def test_values_and_infinities_arrive_as_they_are_in_the_log(no_key, tmp_path):
    from tests.wandb_file import read_history, read_records

    with tracking(tmp_path, 0, wandb="offline", group="sweep-7") as into:
        into.write({"step": 5, "loss": 0.125, "grad_norm": float("inf")})
        into.write({"step": 5, "val_loss": 0.5})
        into.close()
    [part] = (tmp_path / "wandb").glob("offline-run-*")
    [row] = read_history(part)
    assert (row["_step"], row["loss"], row["val_loss"]) == ("5", "0.125", "0.5")
    assert "grad_norm" not in row
    [run] = [record.run for record in read_records(part) if record.HasField("run")]
    assert (run.run_group, run.project, run.display_name) == ("sweep-7", "kdad", "x")


def begun(folder: Path) -> bool:
    """Whether W&B has started, and writes."""
    return bool([*folder.glob(".wandb.*/wandb/offline-run-*/*.wandb")])


def track_and_die(folder: Path) -> None:
    os.environ.pop("WANDB_SERVICE", None)  # that of the tests, which would live on
    with tracking(folder, 0, wandb="offline") as into:
        write(into, 1, 30)
        wait_for(lambda: begun(folder))
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_start_had_to_say_is_sent_by_the_next_one(no_key, tmp_path):
    process = start(track_and_die, tmp_path)
    process.join(180)
    assert process.exitcode == -signal.SIGKILL
    assert steps(tmp_path) == [*range(1, 31)]
    assert len(leftovers(tmp_path)) == 1
    with tracking(tmp_path, 20, wandb="offline") as into:
        write(into, 21, 40)
        into.close()
    assert tracked(tmp_path) == [[*range(1, 41)]]
    assert not leftovers(tmp_path)


def test_a_part_that_was_closed_before_a_kill_is_kept(no_key, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "publish", lambda *_: None)  # as a kill leaves it
        with tracking(tmp_path, 0, wandb="offline") as into:
            write(into, 1, 3)
            into.close()
    with tracking(tmp_path, 3, wandb="offline") as into:
        write(into, 4, 5)
        into.close()
    assert tracked(tmp_path) == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs_is_a_warning_and_its_steps_are_sent_later(
    no_key, tmp_path, number
):
    process = start(track_and_lose_the_service, tmp_path, number)
    process.join(180)
    assert process.exitcode == 0
    log = (tmp_path / "log").read_text()
    assert log.count("Weights & Biases is off") == 1
    assert steps(tmp_path) == [*range(1, 301)]
    assert not (tmp_path / "wandb").exists()
    with tracking(tmp_path, 300, wandb="offline") as into:
        into.close()
    assert tracked(tmp_path) == [[*range(1, 301)]]


def is_service(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # another child, that has just ended
        return process.name() == "wandb-core"
    return False


def track_and_lose_the_service(folder: Path, number: int) -> None:
    logging.basicConfig(filename=folder / "log")
    os.environ.pop("WANDB_SERVICE", None)
    with tracking(folder, 0, wandb="offline") as into:
        write(into, 1, 5)
        wait_for(lambda: begun(folder))
        tracker.PATIENCE = 2.0  # from here on: a start takes its time on a busy machine
        [service] = filter(is_service, psutil.Process().children())
        service.send_signal(number)
        write(into, 6, 300)
        into.close()


def test_a_system_that_hides_processes_makes_no_failure_of_a_warning(monkeypatch, caplog):
    def hidden(_: psutil.Process) -> list[psutil.Process]:
        raise psutil.AccessDenied(1)

    def fail(rows: tracker.Rows) -> None:
        raise OSError("no space")

    monkeypatch.setattr(psutil.Process, "children", hidden)
    aside = tracker.Aside("Some tracker", fail)
    aside.close()
    [warning] = warnings(caplog)
    assert "Some tracker is off from here on (OSError: no space)" in warning
    aside._given_up.release()
    aside._give_up("it hangs")  # as `close` does, in the thread that trains


def test_online_without_a_key_is_offline_and_says_so(no_key, tmp_path, caplog):
    with tracking(tmp_path, 0, wandb="online") as into:
        write(into, 1, 3)
        into.close()
    assert tracked(tmp_path) == [[1, 2, 3]]
    assert any("no key" in message for message in warnings(caplog))


def test_online_without_a_network_is_offline_and_says_so(no_key, tmp_path):
    process = start(track_without_network, tmp_path)
    process.join(180)
    assert process.exitcode == 0
    assert tracked(tmp_path) == [[1, 2, 3]]
    assert "not reached" in (tmp_path / "log").read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def track_without_network(folder: Path) -> None:
    logging.basicConfig(filename=folder / "log")
    os.environ.pop("WANDB_SERVICE", None)
    os.environ |= {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    tracker.PATIENCE = 32.0  # a quarter of it for each start, also on a busy machine
    with tracking(folder, 0, wandb="online") as into:
        write(into, 1, 3)
        into.close()


# ---- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_holds_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    with tracking(tmp_path, 0, tensorboard=True) as into:
        write(into, 1, 9)
        time.sleep(1.1)  # and no close; the names of event files have whole seconds in them
    with tracking(tmp_path, 5, tensorboard=True) as into:
        write(into, 6, 12)
        into.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(1, 13)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_folder_that_tensorboard_may_not_write_is_a_warning(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with tracking(tmp_path, 0, tensorboard=True) as into:
        write(into, 1, 3)
        into.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert [w for w in warnings(caplog) if "TensorBoard is off" in w]
