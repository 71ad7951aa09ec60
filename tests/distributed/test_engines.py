"""The same training in every mode, on any number of processes, and from each into the others."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.integration import test_loramae, test_training
from tests.kdad import Launched, configured, exported, kdad, lines, succeeds, until, weights

pytestmark = pytest.mark.launch

ADAPTED = ["method.weights=random", "method.freeze_random=true"]
NETWORKS = {"stfpm": (test_training.CONFIG, []), "loramae": (test_loramae.CONFIG, ADAPTED)}
"""Convolutions, BatchNorm and SGD; attention, LoRA, frozen weights and AdamW."""
Launch = tuple[str, int]
"""Mode and number of processes."""


class Trainings:
    """Runs of both networks, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.configs: dict[str, Path] = {}
        self.folder = folder
        for network, (config, _) in NETWORKS.items():
            (folder / network).mkdir()
            size = config["data"]["image_size"]
            self.configs[network] = configured(folder / network, {**config, "name": network}, size)
            plain = yaml.safe_load(self.configs[network].read_text())
            plain["data"].pop("augment", None)
            self.configs[network].write_text(yaml.safe_dump(plain))

    def words(self, network: str, run: Path, *more: str) -> list[object]:
        words = ["train", self.configs[network], f"output={run}", *NETWORKS[network][1], *more]
        return [*words, "train.changed_config=accept"]

    def undisturbed(self, network: str, launch: Launch = ("ddp", 1), *more: str) -> Path:
        mode, processes = launch
        run = self.folder / "-".join([network, mode, str(processes), *more])
        if not run.exists():
            words = self.words(network, run, *more)
            outcome = succeeds(*words, processes=processes, mode=mode)
            assert launch == ("ddp", 1) or f"mode {mode}" in outcome.text
        return run

    def moved(self, network: str, launches: Sequence[Launch], *more: str) -> Path:
        """A run that is stopped after every sixth step and goes on as another launch."""
        run = self.folder / "-".join([network, *(f"{m}{n}" for m, n in launches), *more])
        if run.exists():
            return run
        for part, (mode, processes) in enumerate(launches, 1):
            words = self.words(network, run, f"train.steps={6 * part}", *more)
            outcome = succeeds(*words, processes=processes, mode=mode)
            assert (f"going on from step {6 * part - 6}" in outcome.text) == (part > 1)
        return run


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("engines"))


def apart(first: Path, second: Path, steps: int = 20) -> float:
    """The largest difference of the loss in the first steps of two runs."""
    one, two = lines(first), lines(second)
    return max(abs(one[step] - two[step]) for step in range(1, steps + 1))


@pytest.mark.parametrize(
    ("network", "processes", "more", "alone"),
    [
        ("stfpm", 1, [], []),
        ("stfpm", 4, [], []),
        # BatchNorm sees the micro-batch of all processes.
        ("stfpm", 2, ["train.micro_batch_size=2"], ["train.micro_batch_size=4"]),
        ("loramae", 3, ["train.micro_batch_size=1"], []),
        ("loramae", 4, ["train.batch_size=3"], ["train.batch_size=3"]),
    ],
)
def test_the_loss_does_not_depend_on_the_mode(trainings, network, processes, more, alone):
    plain = trainings.undisturbed(network, ("ddp", 1), *alone)
    assert apart(trainings.undisturbed(network, ("fsdp2", processes), *more), plain) < 1e-5


@pytest.mark.parametrize("network", ["stfpm", "loramae"])
def test_a_run_moves_between_modes_and_numbers_of_processes(trainings, network):
    launches = [("ddp", 1), ("fsdp2", 4), ("ddp", 3), ("fsdp2", 2)]
    run = trainings.moved(network, launches)
    assert lines(run).keys() == set(range(1, 25))
    assert apart(run, trainings.undisturbed(network)) < 1e-5


@pytest.mark.parametrize(
    "processes", [pytest.param(n, marks=pytest.mark.soak) for n in (1, 2, 3)] + [4]
)
def test_shards_resume_to_the_bits_of_the_undisturbed_run(trainings, processes):
    launch = ("fsdp2", processes)
    run = trainings.moved("loramae", [launch] * 2)
    undisturbed = trainings.undisturbed("loramae", launch, "train.steps=12")
    assert weights(run) == weights(undisturbed)
    assert lines(run) == lines(undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("network", ["stfpm", "loramae"])
@pytest.mark.parametrize("saved", [1, 2, 3, 4])
@pytest.mark.parametrize("resumed", [1, 2, 3, 4])
@pytest.mark.parametrize("modes", list(itertools.product(("ddp", "fsdp2"), repeat=2)))
def test_any_launch_goes_on_from_any_other(trainings, network, saved, resumed, modes):
    run = trainings.moved(network, [(modes[0], saved), (modes[1], resumed)])
    assert apart(run, trainings.undisturbed(network), steps=12) < 1e-5


def test_each_process_writes_its_own_part_and_frozen_weights_are_not_among_them(trainings):
    run = trainings.undisturbed("loramae", ("fsdp2", 3))
    newest = max((run / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    parts = [entry["bytes"] for name, entry in manifest["files"].items() if "distcp" in name]
    assert len(parts) == 3 and max(parts) < 2 * min(parts)
    full = sum(tensor.numel() * 4 for tensor in load_file(exported(run)).values())
    assert sum(parts) < 0.2 * 3 * full  # tiny: its layers outside of blocks weigh much


def test_a_run_of_shards_is_scored_by_any_launch_and_none(trainings):
    run = trainings.undisturbed("stfpm", ("fsdp2", 4))
    found = set()
    for mode, processes in (("ddp", 1), ("fsdp2", 2)):
        succeeds("score", run, processes=processes, mode=mode)
        found.add((run / "scores/scores.csv").read_bytes())
    assert len(found) == 1


def test_saving_in_the_background_changes_nothing_and_survives_being_killed(trainings):
    more = "checkpoint.asynchronous=true"
    run = trainings.folder / "background"
    words = trainings.words("stfpm", run, more)
    for launch in (("ddp", 2), ("fsdp2", 2)):
        before = set(run.glob("checkpoints/step_*"))
        launched = Launched(words, launch[1], mode=launch[0])
        until(launched, lambda before=before: bool({*run.glob("checkpoints/step_*")} - before))
        launched.kill(only=1)
        launched.wait()
    succeeds(*words, processes=2)
    assert apart(run, trainings.undisturbed("stfpm"), 24) < 1e-5
    assert weights(trainings.undisturbed("stfpm", ("ddp", 2), more)) == weights(
        trainings.undisturbed("stfpm", ("ddp", 2))
    )
    assert not list(run.glob("checkpoints/.*"))


def test_a_save_that_fails_in_the_background_is_an_error(trainings):
    run = trainings.folder / "unsaved"
    words = trainings.words("stfpm", run, "checkpoint.asynchronous=true", "train.steps=3")
    succeeds(*words, processes=2)
    blocked = run / "checkpoints" / "step_00000006"
    blocked.write_text("in the way")
    outcome = kdad(*words, "train.steps=9", processes=2)
    assert outcome.codes == [1, 1] and "step_00000006" in outcome.text
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_low_precision_means_the_same_for_shards(trainings):
    more = "train.precision=bf16"
    run = trainings.undisturbed("loramae", ("fsdp2", 2), more)
    plain = trainings.undisturbed("loramae", ("ddp", 2), more)
    assert apart(run, plain) < 1e-5
    assert apart(run, trainings.undisturbed("loramae")) > 1e-5, "bf16 is not in force"


def test_an_update_that_is_not_finite_is_not_applied(trainings):
    for network in ("stfpm", "loramae"):
        run = trainings.folder / f"{network}-diverged"
        words = trainings.words(network, run, "optim.lr=1e30", "optim.clip=null")
        outcome = kdad(*words, processes=2, mode="fsdp2")
        assert outcome.codes == [1, 1] and "is not finite" in outcome.text
