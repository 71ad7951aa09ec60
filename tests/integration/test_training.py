"""Training as a whole: parallel equals serial, killed equals undisturbed, and every refusal."""

import hashlib
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.kdad import Launched, configured, kdad, lines, stops, succeeds, until, weights
from tests.tiny import tiny

pytestmark = pytest.mark.launch

CONFIG = tiny(
    "stfpm",
    optim={"lr": 0.03, "weight_decay": 1.0e-4},
    train={"steps": 24, "check_every": 3},
    checkpoint={"every_steps": 3, "keep": 2},
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A training of 24 steps over 20 images: 16 or so to train on, a short batch every epoch."""
    return configured(tmp_path_factory.mktemp("training"), CONFIG, size=32)


@pytest.fixture(scope="module")
def undisturbed(config) -> dict[int, Path]:
    """A finished run on 1, 2, 3 and 4 processes."""
    runs = {}
    for processes in (1, 2, 3, 4):
        runs[processes] = config.parent / f"undisturbed{processes}"
        succeeds("train", config, f"output={runs[processes]}", processes=processes)
    return runs


def test_the_loss_does_not_depend_on_the_number_of_processes(undisturbed):
    serial = lines(undisturbed[1])
    assert len(serial) == 24
    for processes in (2, 3, 4):
        parallel = lines(undisturbed[processes])
        difference = max(abs(parallel[step] - serial[step]) for step in range(1, 21))
        assert difference < 1e-5, f"{processes} processes differ by {difference}"
        assert (
            lines(undisturbed[processes], "val_loss").keys()
            == lines(undisturbed[1], "val_loss").keys()
        )


def test_accumulated_gradients_do_not_depend_on_the_number_of_processes(config):
    # Two passes on either: of up to 3 global rows each.
    for processes, size in ((1, 3), (2, 2)):
        run = config.parent / f"accumulated{processes}"
        more = [f"output={run}", f"train.micro_batch_size={size}"]
        succeeds("train", config, *more, processes=processes)
    one, two = (lines(config.parent / f"accumulated{n}") for n in (1, 2))
    assert max(abs(one[step] - two[step]) for step in range(1, 21)) < 1e-5


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_a_killed_run_ends_with_the_weights_of_the_undisturbed_one(config, undisturbed, processes):
    run = config.parent / f"killed{processes}"
    moments = random.Random(processes)
    for _ in range(2):
        launched = Launched(["train", config, f"output={run}"], processes)
        until(launched, lambda: bool(list(run.glob("checkpoints/step_*"))))
        time.sleep(moments.uniform(0, 1))
        launched.kill()
        launched.wait()
    succeeds("train", config, f"output={run}", processes=processes)
    assert weights(run) == weights(undisturbed[processes])
    assert lines(run) == lines(undisturbed[processes])
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_finished_run_started_again_changes_nothing(config, undisturbed):
    run = undisturbed[1]
    before = (run / "metrics.jsonl").read_bytes()
    outcome = succeeds("train", config, f"output={run}", "score.topk=7")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "finished: it has taken all its 24 steps" in outcome.text
    assert "going on" not in outcome.text
    assert "topk: 7" in (run / "config.yaml").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_finished_run_goes_on_when_it_is_given_more_steps(config, undisturbed):
    run = shutil.copytree(undisturbed[2], config.parent / "longer")
    more = ["train.steps=30", "train.changed_config=accept"]
    outcome = succeeds("train", config, f"output={run}", *more, processes=2)
    assert "going on from step 24 of 30" in outcome.text
    outcome = succeeds("train", config, f"output={run}", *more, processes=2)
    assert "finished: it has taken all its 30 steps" in outcome.text


def test_a_damaged_checkpoint_is_passed_over_with_a_message(config, undisturbed):
    run = config.parent / "damaged"
    shutil.copytree(undisturbed[1], run)
    newest = max((run / "checkpoints").glob("step_*"))
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    outcome = succeeds("train", config, f"output={run}")
    assert newest.name in outcome.text
    assert weights(run) == weights(undisturbed[1])


def test_the_same_weights_export_to_the_same_bytes_and_read_back(undisturbed):
    first, second = weights(undisturbed[1]), weights(undisturbed[1])
    assert first == second
    file = undisturbed[1] / "export/student.safetensors"
    assert all(tensor.size for tensor in load_file(file).values())
    manifest = json.loads((file.parent / "manifest.json").read_text())[file.name]
    assert manifest["sha256"] == hashlib.sha256(first).hexdigest()
    assert manifest["bytes"] == len(first)
    assert manifest["tensors"] == manifest["tensors_of_checkpoint"] > 0
    assert manifest["checkpoint_step"] == 24


def test_the_best_checkpoint_is_kept_beside_the_newest(undisturbed):
    losses = lines(undisturbed[1], "val_loss")
    best = min(losses, key=lambda step: losses[step])
    kept = {int(path.name[5:]) for path in (undisturbed[1] / "checkpoints").glob("step_*")}
    assert {best, 24} <= kept
    assert len(kept) <= 3


@pytest.mark.parametrize("processes", [1, 3])
def test_a_run_whose_time_is_over_saves_and_goes_on_later(config, undisturbed, processes):
    run = config.parent / f"timed{processes}"
    words = ["train", config, f"output={run}"]
    step = stops(*words, processes=processes)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step)
    assert 0 < step < 24 and (run / f"checkpoints/step_{step:08}").is_dir()
    succeeds(*words, processes=processes)
    assert weights(run) == weights(undisturbed[processes])


@pytest.mark.parametrize("ask", ["PREEMPT", signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_asked_to_stop_saves_and_leaves_with_75(config, ask):
    run = config.parent / f"asked-{ask}"
    more = ["train.steps=100000", "checkpoint.every_steps=null", "train.validate_every=10000"]
    launched = Launched(["train", config, f"output={run}", *more], 2)
    until(launched, lambda: (run / "metrics.jsonl").exists() and lines(run) != {})
    if ask == "PREEMPT":
        (run / "PREEMPT").touch()
    else:
        launched.kill(ask, only=1)  # one process is enough
    outcome = launched.wait()
    assert outcome.codes == [75, 75], outcome.text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (run / f"checkpoints/step_{status['step']:08d}").is_dir()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_update_that_is_not_finite_stops_every_process_and_is_never_saved(config, processes):
    run = config.parent / f"diverged{processes}"
    outcome = kdad("train", config, f"output={run}", "optim.lr=1e30", processes=processes)
    assert all(outcome.codes), outcome.text
    assert "of step 2 is not finite" in outcome.text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "not finite" in status["reason"]
    assert not list(run.glob("checkpoints/step_*"))


def test_fewer_images_than_processes_train(config):
    run = config.parent / "few"
    more = [f"output={run}", "data.val_fraction=0.9", "train.steps=3"]
    succeeds("train", config, *more, processes=4)


def test_another_configuration_in_the_same_directory_is_refused_by_key(config, undisturbed):
    outcome = kdad("train", config, f"output={undisturbed[1]}", "optim.lr=0.2", "seed=3")
    assert outcome.codes == [2]
    assert "optim.lr: 0.03 in the run, 0.2 now" in outcome.text
    assert "seed: 0 in the run, 3 now" in outcome.text


def test_two_runs_in_one_directory_are_refused(config):
    run = config.parent / "shared"
    words = ["train", config, f"output={run}", "train.steps=1000000"]
    launched = Launched(words, 1)
    until(launched, (run / "status.json").exists)
    outcome = kdad(*words)
    launched.kill()
    launched.wait()
    assert outcome.codes == [2]
    assert "in use by another process" in outcome.text
