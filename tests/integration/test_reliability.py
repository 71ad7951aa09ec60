"""The corners of what `make soak` does at length: kills, flipped bits, full disks, odd numbers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdad_dist.runtime.manifest import verify
from tests.disks import mounted, resize
from tests.helpers import make_mvtec
from tests.kdad import configured, kdad, lines, succeeds
from tests.launcher import wait_for
from tests.soak import campaigns
from tests.soak.campaigns import CONFIG, PROCESSES, same_training

pytestmark = pytest.mark.launch
STEPS = 100


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return configured(tmp_path_factory.mktemp("reliability"), CONFIG, size=32)


@pytest.fixture(scope="module")
def undisturbed(config) -> Path:
    """A finished run on two processes."""
    run = config.parent / "undisturbed"
    succeeds("train", config, f"output={run}", f"train.steps={STEPS}", processes=PROCESSES)
    return run


def test_five_kills_of_any_process_change_nothing(config, undisturbed, tmp_path):
    run = tmp_path / "killed"
    found = campaigns.kill(config, run, kills=5, seed=1, launchers=0, steps=STEPS)
    assert not found.faults
    assert found.checkpoints > 5
    same_training(run, undisturbed)


def test_processes_whose_launcher_is_killed_save_and_stop_in_order(config, tmp_path):
    run = tmp_path / "run"
    words = ["train", config, f"output={run}", "train.steps=100000", "train.validate_every=100000"]
    words += ["checkpoint.every_steps=null", "checkpoint.asynchronous=true"]

    def trains() -> None:
        log = run / "metrics.jsonl"
        wait_for(lambda: log.exists() and campaigns.taken(log))

    campaigns.kill_launcher(words, PROCESSES, trains)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted", status
    verify(run / f"checkpoints/step_{status['step']:08d}")


def test_twenty_flips_and_five_truncations_are_all_told(config, undisturbed):
    found = campaigns.damage(undisturbed, config.parent / "shards", 20, 5, seed=2)
    assert found.hits.total() == 25
    assert {outcome.partition(" ")[0] for outcome in found.outcomes} == {"checkpoint", "shard"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path, "6m"):
        yield tmp_path


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_disk_that_fills_stops_a_training_which_goes_on_when_it_has_room(
    config, undisturbed, small_disk, asynchronous
):
    run = small_disk / "run"
    words = ["train", config, f"output={run}", f"train.steps={STEPS}"]
    words += [f"checkpoint.asynchronous={asynchronous}"]
    outcome = kdad(*words, "checkpoint.keep=1000", processes=PROCESSES)
    assert 1 in outcome.codes, outcome.text
    assert "No space left on device" in outcome.text
    assert "Traceback" not in outcome.text
    kept = [*run.glob("checkpoints/*")]
    assert kept
    for path in kept:
        verify(path)
    resize(small_disk, "60m")
    outcome = succeeds(*words, processes=PROCESSES)
    assert f"going on from step {max(kept).name[-3:].lstrip('0')} of {STEPS}" in outcome.text
    same_training(run, undisturbed)


@pytest.mark.parametrize(("images", "processes"), [(1003, 4), (1, 4)])
def test_an_odd_number_of_images_is_neither_padded_nor_cut(config, tmp_path, images, processes):
    make_mvtec(tmp_path / "images", train=images, good=1, scratch=1)
    succeeds("pack", tmp_path / "images", tmp_path / "shards", "--size", 32)
    words = [f"data.shards={tmp_path / 'shards'}", f"output={tmp_path / 'run'}"]
    words += ["train.steps=null", "train.epochs=1", "train.batch_size=60", "data.val_fraction=0"]
    succeeds("train", config, *words, processes=processes)
    seen = [*lines(tmp_path / "run", "samples_seen").values()]
    assert seen == [*range(60, images, 60), images]
