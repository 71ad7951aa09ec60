"""What takes too long for every day: `make soak` runs it and writes docs/soak.md."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kdad import configured, succeeds
from tests.soak import campaigns
from tests.soak.campaigns import CONFIG, PROCESSES, same_training

pytestmark = [pytest.mark.soak, pytest.mark.launch]
Property = Callable[[str, object], None]
STEPS = 300
"""So many that fifty starts do not come to the end of them."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return configured(tmp_path_factory.mktemp("soak"), CONFIG, size=32)


def told(counted: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counted.items()))


@pytest.mark.parametrize(("processes", "kills"), [(2, 50), (3, 12), (4, 12)])
def test_kills_of_any_process_or_of_the_launcher_change_nothing(
    config, processes, kills, record_property: Property
):
    seed, run = 50, config.parent / f"killed{processes}"
    undisturbed = config.parent / f"undisturbed{processes}"
    record_property("seed", seed)
    found = campaigns.kill(
        config, run, kills, seed, launchers=kills // 8, steps=STEPS, processes=processes
    )
    record_property("SIGKILLs", f"{found.victims.total()}: {told(found.victims)}")
    record_property("moments (random within)", told(found.moments))
    record_property("steps left to take after the last kill", found.left)
    record_property("directories seen under the name of a checkpoint, verified", found.checkpoints)
    record_property("of these half-written or damaged", len(found.faults))
    assert not found.faults
    campaigns.finish(["train", config, f"output={undisturbed}", f"train.steps={STEPS}"], processes)
    same_training(run, undisturbed)
    record_property(
        "compared with the undisturbed run",
        f"{STEPS} steps on {processes} processes: the same weights to the bit, the same losses, "
        "each step once in metrics.jsonl",
    )


def test_two_hundred_flips_and_fifty_truncations_are_all_told(config, record_property: Property):
    seed, run = 200, config.parent / "damaged"
    record_property("seed", seed)
    succeeds("train", config, f"output={run}", processes=PROCESSES)
    found = campaigns.damage(run, config.parent / "shards", 200, 50, seed)
    record_property("damages by file", told(found.hits))
    for outcome, count in sorted(found.outcomes.items()):
        record_property(outcome, count)
    record_property("damaged bytes loaded, or damages that nothing told", 0)
