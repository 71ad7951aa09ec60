"""DeepSpeed's ZeRO: the same training as under DDP, and checkpoints for any mode and number."""

import json
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdad_dist.runtime.tensors import open_checkpoint, read_into
from kdad_dist.runtime.zero_files import FOLDER
from tests.kdad import MODES, exported, kdad, limit_files, succeeds
from tests.shards import make_shards

zero_to_fp32 = pytest.importorskip("deepspeed.utils.zero_to_fp32")
pytestmark = pytest.mark.launch

STEPS, HALF = 20, 10
STAGES = ("zero1", "zero2", "zero3")
NUMBERS = (1, 2, 3, 4)
CONFIGS = {
    # BatchNorm, momentum, and batches of 7 that no number of processes divides.
    "stfpm": {
        "method": {"name": "stfpm", "teacher": {"weights": "random"}},
        "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 0.001},
        "train": {"batch_size": 7},
    },
    # Frozen parameters, gradients that are accumulated and clipped, a process without rows.
    "loramae": {
        "method": {"name": "loramae", "weights": "random", "freeze_random": True,
                   "preset": "mae_vit_tiny_patch8"},
        "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.05, "clip": 0.5},
        "train": {"batch_size": 7, "micro_batch_size": 1},
    },
}  # fmt: skip


class Runs:
    """Runs of the configurations in one folder, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_shards(root / "shards", train=40, size=32, packed_size=32)
        for name, config in CONFIGS.items():
            train = {"steps": STEPS, "log_every": 1, "check_every": 1, **config["train"]}
            data = {"shards": str(root / "shards"), "image_size": 32}
            keep = {"every_steps": HALF, "keep": 9, "asynchronous": name == "loramae"}
            body = {"name": name, "data": data, "checkpoint": keep, **config, "train": train}
            (root / f"{name}.yaml").write_text(yaml.safe_dump(body))

    def train(self, name: str, mode: str, processes: int, *words: str) -> Path:
        """A whole training."""
        run = self.root / "-".join([name, mode, str(processes), *words])
        if not run.exists():
            config = self.root / f"{name}.yaml"
            succeeds("train", config, f"output={run}", *words, processes=processes, mode=mode)
        return run

    def resume(self, run: Path, mode: str, processes: int) -> Path:
        """The second half of a whole training once more, from its checkpoint in the middle."""
        copy = self.root / f"{run.name}-resumed-{mode}-{processes}"
        if copy.exists():
            return copy
        shutil.copytree(run, copy)
        for path in (copy / "checkpoints").glob("step_*"):
            if path.name > f"step_{HALF:08}":
                shutil.rmtree(path)
        (copy / "status.json").unlink()
        config = self.root / f"{run.name.partition('-')[0]}.yaml"
        succeeds("train", config, f"output={copy}", processes=processes, mode=mode)
        return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("zero"))


def curves(run: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "val_loss")
    return {(line["step"], key): line[key] for line in lines for key in keys if key in line}


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def assert_same_training(run: Path, other: Path) -> None:
    assert curves(run).keys() == curves(other).keys()
    assert curves(run) == pytest.approx(curves(other), rel=0, abs=1e-5)


def assert_same_weights(run: Path, other: Path, tolerance: float = 0.0) -> None:
    one, two = (load_file(exported(path)) for path in (run, other))
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "mode", "processes"),
    [("stfpm", "zero3", 2), ("loramae", "zero2", 3)],
)
def test_the_training_is_that_of_one_process_under_ddp(
    runs: Runs, name: str, mode: str, processes: int
) -> None:
    run = runs.train(name, mode, processes)
    assert_same_training(run, runs.train(name, "ddp", 1))
    assert_same_weights(run, runs.train(name, "ddp", 1), 1e-5)


def test_every_process_writes_its_part_and_nothing_that_is_frozen(runs: Runs) -> None:
    run = runs.train("loramae", "zero2", 3)
    path = run / f"checkpoints/step_{HALF:08}"
    manifest = manifest_of(path)
    assert manifest["format"] == "zero"
    assert sorted(manifest["files"]) == [
        "zero/mp_rank_00_model_states.pt",
        *(f"zero/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)),
    ]
    sizes = [manifest["files"][name]["bytes"] for name in sorted(manifest["files"])]
    assert sizes[1:] == pytest.approx([sizes[1]] * 3, rel=0.05)
    assert sizes[0] < 0.1 * sizes[1]
    whole = sum(value.nbytes for value in load_file(exported(run)).values())
    # A training of all weights would write each with two moments.
    assert sum(entry["bytes"] for entry in manifest["files"].values()) < 0.05 * 3 * whole


def test_deepspeeds_own_tool_reads_the_same_weights(runs: Runs) -> None:
    path = runs.train("loramae", "zero2", 3) / f"checkpoints/step_{STEPS:08}"
    expected = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(path), FOLDER)
    stored, reader = open_checkpoint(path, manifest_of(path)["files"])
    found = {f"student.{name}": torch.empty_like(value) for name, value in expected.items()}
    assert found.keys() == {name for name in stored if name.startswith("student.")}
    read_into(found, reader)
    for name, value in expected.items():
        assert torch.equal(found[f"student.{name}"], value), name


@pytest.mark.parametrize(
    ("name", "mode", "processes"), [("stfpm", "zero3", 2), ("loramae", "zero2", 3)]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    runs: Runs, name: str, mode: str, processes: int
) -> None:
    run = runs.train(name, mode, processes)
    resumed = runs.resume(run, mode, processes)
    assert curves(resumed) == curves(run)
    assert_same_weights(resumed, run)


@pytest.mark.parametrize(
    ("name", "saved", "resumed"),
    [
        ("stfpm", ("zero3", 2), ("zero1", 1)),
        ("loramae", ("zero2", 3), ("zero3", 2)),
        ("loramae", ("zero2", 3), ("ddp", 1)),
        ("loramae", ("ddp", 1), ("zero2", 4)),
    ],
)
def test_a_run_goes_on_in_another_mode_on_another_number_of_processes(
    runs: Runs, name: str, saved: tuple[str, int], resumed: tuple[str, int]
) -> None:
    run = runs.resume(runs.train(name, *saved), *resumed)
    assert_same_training(run, runs.train(name, "ddp", 1))
    assert_same_weights(run, runs.train(name, "ddp", 1), 1e-5)


def test_a_full_disk_of_the_processes_is_an_error_and_leaves_nothing(runs: Runs) -> None:
    run = runs.root / "full"
    words = ("train", runs.root / "loramae.yaml", f"output={run}", "checkpoint.every_steps=1")
    outcome = kdad(*words, processes=2, mode="zero2", first=partial(limit_files, 120_000))
    assert outcome.codes == [1, 1]
    assert "step_00000001 cannot be written: rank 0: OSError" in outcome.text
    assert list((run / "checkpoints").iterdir()) == []


def test_a_step_that_is_not_finite_is_left_out_and_nothing_is_saved(runs: Runs) -> None:
    run = runs.root / "infinite"
    words = ("train", runs.root / "loramae.yaml", f"output={run}", "optim.lr=1.0e30")
    outcome = kdad(*words, "optim.clip=null", processes=2, mode="zero3")
    assert outcome.codes == [1, 1]
    assert "step 2 is not finite; its update was not applied" in outcome.text
    assert not (run / "checkpoints").exists()


@pytest.mark.soak
@pytest.mark.parametrize(("name", "mode", "processes"), list(product(CONFIGS, STAGES, NUMBERS)))
def test_every_stage_on_every_number_of_processes_trains_the_same(
    runs: Runs, name: str, mode: str, processes: int
) -> None:
    run = runs.train(name, mode, processes)
    assert_same_training(run, runs.train(name, "ddp", 1))
    assert_same_weights(run, runs.train(name, "ddp", 1), 1e-5)


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "saved", "resumed"), list(product(STAGES, NUMBERS, NUMBERS)))
def test_any_number_of_processes_goes_on_from_any_other(
    runs: Runs, mode: str, saved: int, resumed: int
) -> None:
    whole = runs.train("loramae", mode, saved)
    run = runs.resume(whole, mode, resumed)
    if saved == resumed:
        assert curves(run) == curves(whole)
        assert_same_weights(run, whole)
    assert_same_training(run, runs.train("loramae", "ddp", 1))


@pytest.mark.soak
@pytest.mark.parametrize(("saved", "resumed"), list(product(MODES, MODES)))
def test_any_mode_goes_on_from_any_other(runs: Runs, saved: str, resumed: str) -> None:
    run = runs.resume(runs.train("loramae", saved, 3), resumed, 2)
    assert_same_training(run, runs.train("loramae", "ddp", 1))
