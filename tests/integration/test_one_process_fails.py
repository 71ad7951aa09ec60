"""What goes wrong on one process alone: it is said once, others follow, nothing half-done stays."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import make_mvtec, save_image, texture
from tests.integration.test_launchers import LAUNCH, REPOSITORY, launch
from tests.kdad import Launched, Outcome, kdad, succeeds, until

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A configuration; the run `run` beside it is trained and scored."""
    folder = tmp_path_factory.mktemp("fails")
    make_mvtec(folder / "images", train=12)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    text = {
        "name": "fails",
        "data": {"shards": str(folder / "shards"), "image_size": 32, "cache": "none"},
        "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1]}},
        "optim": {"name": "adam", "lr": 1.0e-3},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1},
    }
    (folder / "fails.yaml").write_text(yaml.safe_dump(text))
    succeeds("train", folder / "fails.yaml", f"output={folder / 'run'}")
    succeeds("score", folder / "run")
    return folder / "fails.yaml"


def damaged(shards: Path, out: Path, split: str, number: int) -> tuple[Path, str]:
    """A copy of the shards in which one image of a split has a flipped bit; its key."""
    shutil.copytree(shards, out)
    rows = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    row = [row for row in rows if row["split"] == split][number]
    with (out / row["shard"]).open("r+b") as file:
        file.seek(row["image"]["offset"] + 40)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    return out, row["key"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def said_once(outcome: Outcome, *words: str) -> None:
    assert outcome.codes == [1, 1], outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert outcome.text.count("kdad: ") == 1, outcome.text
    assert all(word in outcome.text for word in words), outcome.text


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_image_of_one_process_ends_the_scoring_of_all(config, tmp_path, number):
    run = shutil.copytree(config.parent / "run", tmp_path / "run")
    shards, key = damaged(config.parent / "shards", tmp_path / "shards", "test", number)
    before = names(run)
    said_once(kdad("score", run, "--shards", shards, processes=2), key)
    assert {name for name in names(run) if not name.endswith(".partial")} == before


@pytest.mark.parametrize("number", [0, 1])
def test_a_new_image_that_one_process_cannot_read_ends_all(config, tmp_path, number):
    for i in range(4):
        save_image(tmp_path / f"new/{i}.png", texture(i))
    (tmp_path / f"new/{number}.png").write_text("no image")
    out = tmp_path / "out"
    words = ["--images", tmp_path / "new", "--out", out]
    said_once(kdad("score", config.parent / "run", *words, processes=2), f"{number}.png")
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_missing_are_said_once(config, tmp_path):
    words = ["train", config, f"output={tmp_path / 'run'}", "method.teacher.weights=absent.pth"]
    said_once(kdad(*words, processes=2), "absent.pth")


def test_a_damaged_image_of_one_process_ends_training_by_name(config, tmp_path):
    shards, key = damaged(config.parent / "shards", tmp_path / "shards", "train", 0)
    run = tmp_path / "run"
    options = ["--config_file", REPOSITORY / "launch/accelerate/cpu.yaml", "--num_processes", 2]
    words = ["train", config, f"data.shards={shards}", f"output={run}"]
    done = launch(*LAUNCH, "--main_process_port", 0, *options, "-m", "kdad_dist", *words)
    assert done.returncode == 1
    assert key in done.stderr
    assert "Connection closed" not in done.stderr
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert key in status["reason"]


def say_who_is_seen() -> None:
    """Has each process leave a file when it knows of all others."""
    from kdad_dist.runtime.watch import Watch

    [run] = [word.removeprefix("output=") for word in sys.argv if word.startswith("output=")]
    look = Watch._look

    def look_and_say(self: Watch) -> None:
        look(self)
        if len(self.signs) == self.world:
            Path(f"{run}.seen{self.rank}").touch()

    Watch._look = look_and_say


def take_long_to_note() -> None:
    """Has the main process note for a second what is left, and then say that it has."""
    from kdad_dist.runtime.tracker import Tracker

    [run] = [word.removeprefix("output=") for word in sys.argv if word.startswith("output=")]

    def close(self: Tracker) -> None:
        if self.file is not None:
            time.sleep(1)
            Path(f"{run}.noted").touch()
            time.sleep(1)  # in which the others would have ended, if they ever did so first

    Tracker.close = close


@pytest.mark.parametrize(("rate", "code"), [(1e30, 1), (1e-3, 75)])
def test_who_shares_an_error_leaves_after_the_main_process_has_noted_it(
    config, tmp_path, rate, code
):
    run = tmp_path / "run"
    more = [f"output={run}", "train.steps=100000", "optim.clip=null", f"optim.lr={rate}"]
    launched = Launched(["train", config, *more], 2, take_long_to_note)
    if code == 75:
        until(launched, (run / "metrics.jsonl").exists)
        (run / "PREEMPT").touch()
    until(launched, Path(f"{run}.noted").exists)
    outcome = launched.wait()
    assert outcome.codes == [code, code] and outcome.text.count("kdad: ") == 1, outcome.text


def test_a_run_without_a_checkpoint_is_refused_once(config, tmp_path):
    run = shutil.copytree(config.parent / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    said_once(kdad("score", run, processes=2), "no sound checkpoint")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_hangs_or_dies_is_named(config, tmp_path, number):
    run = tmp_path / "run"
    more = ["train.steps=100000", "train.timeout_minutes=0.15", "train.validate_every=100000"]
    launched = Launched(["train", config, f"output={run}", *more], 2, say_who_is_seen)
    log, seen = run / "metrics.jsonl", [tmp_path / f"run.seen{rank}" for rank in range(2)]
    until(launched, lambda: log.is_file() and all(file.exists() for file in seen))
    launched.kill(number, only=1)
    launched.ranks[0].join(120)
    outcome = launched.wait(grace=0)  # as launchers do, it kills whom a failed process leaves
    assert outcome.codes[0] == 1, outcome.text
    assert "Traceback" not in outcome.text
    assert f"process 1 of 2 (pid {launched.ranks[1].pid} on " in outcome.text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    if number == signal.SIGSTOP:
        assert "process 1 of 2" in status["reason"] and "does not answer" in status["reason"]


def test_a_mistake_does_not_bind_the_next_attempt_to_itself(config, tmp_path):
    words = ["train", config, f"output={tmp_path / 'run'}"]
    assert kdad(*words, "method.teacher.weights=absent.pth").codes == [1]
    assert not (tmp_path / "run").exists()
    succeeds(*words)


def test_the_launcher_leaves_with_the_code_of_a_wrong_configuration(config, tmp_path):
    module = [sys.executable, "-m", "kdad_dist.runtime.launcher", "--run-directory"]
    done = launch(*module, tmp_path / "absent.yaml")
    assert done.returncode == 2
    assert "absent.yaml" in done.stderr
