"""The corners of what `make soak` does at length: kills, flipped bits, full disks, odd numbers."""

from pathlib import Path

import pytest

from tests.kdad import configured, succeeds
from tests.soak import campaigns
from tests.soak.campaigns import CONFIG, PROCESSES, same_training

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return configured(tmp_path_factory.mktemp("reliability"), CONFIG, size=32)


@pytest.fixture(scope="module")
def undisturbed(config) -> Path:
    """A finished run of 150 steps on two processes."""
    run = config.parent / "undisturbed"
    succeeds("train", config, f"output={run}", "train.steps=150", processes=PROCESSES)
    return run


def test_five_kills_of_any_process_or_of_the_launcher_change_nothing(config, undisturbed, tmp_path):
    run = tmp_path / "killed"
    found = campaigns.kill(config, run, kills=5, seed=1, launchers=1, steps=150)
    assert not found.faults
    assert found.checkpoints > 5
    same_training(run, undisturbed)


def test_twenty_flips_and_five_truncations_are_all_told(config, undisturbed):
    found = campaigns.damage(undisturbed, config.parent / "shards", 20, 5, seed=2)
    assert found.hits.total() == 25
    assert {outcome.partition(" ")[0] for outcome in found.outcomes} == {"checkpoint", "shard"}
