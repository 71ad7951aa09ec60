"""LoRA-MAE as a whole: a base is trained and exported, adapted, killed, resumed, refused."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.kdad import configured, exported, kdad, lines, succeeds

pytestmark = pytest.mark.launch

PRESET = "mae_vit_tiny_patch8"
CONFIG = {
    "name": "adapted",
    "data": {
        "image_size": 32,
        "augment": {"crop_margin": 4, "brightness": 0.1, "saturation": 0.1, "flip": True},
    },
    "method": {"name": "loramae", "preset": PRESET},
    "optim": {
        "name": "adamw",
        "lr": 1.0e-3,
        "betas": [0.9, 0.95],
        "weight_decay": 0.001,
        "decay_vectors": False,
    },
    "train": {"steps": 24, "batch_size": 6, "log_every": 1, "check_every": 3},
    "checkpoint": {"every_steps": 3, "keep": 2},
}
FULL = ["method.weights=random", "method.lora=null", "method.freeze_non_lora=false"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A configuration that adapts a base which was trained here, in full, and exported."""
    path = configured(tmp_path_factory.mktemp("loramae"), CONFIG, size=36)
    settings, base = yaml.safe_load(path.read_text()), path.parent / "base"
    succeeds("train", path, f"output={base}", "train.steps=4", *FULL)
    succeeds("export", base)
    settings["method"]["weights"] = str(base / "export/student.safetensors")
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def undisturbed(config) -> dict[int, Path]:
    """A finished run on 1 and 3 processes."""
    runs = {}
    for processes in (1, 3):
        runs[processes] = config.parent / f"undisturbed{processes}"
        succeeds("train", config, f"output={runs[processes]}", processes=processes)
    return runs


def test_an_adaptation_starts_from_the_checkpoint_of_another(config, undisturbed, tmp_path):
    source = undisturbed[1] / "checkpoints/step_00000024"
    words = [f"train.init_from={source}", "optim.lr=1e-12", "train.steps=1"]
    succeeds("train", config, f"output={tmp_path / 'run'}", *words)
    one, two = (load_file(exported(run)) for run in (undisturbed[1], tmp_path / "run"))
    assert all(torch.allclose(one[name], two[name], atol=1e-9) for name in one)
    words = ["method.weights=random", "method.freeze_random=true"]
    outcome = kdad(
        "train", config, f"output={tmp_path / 'no'}", f"train.init_from={source}", *words
    )
    assert outcome.codes == [1]
    assert "is of another run: it differs in" in outcome.text


def test_masks_augmentation_and_losses_do_not_depend_on_the_number_of_processes(
    config, undisturbed
):
    accumulated = config.parent / "accumulated"
    words = [f"output={accumulated}", "train.micro_batch_size=2"]
    succeeds("train", config, *words, processes=2)
    serial = lines(undisturbed[1])
    assert len(serial) == 24
    for run in (undisturbed[3], accumulated):
        assert max(abs(lines(run)[step] - serial[step]) for step in range(1, 21)) < 1e-5


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(undisturbed):
    newest = max((undisturbed[1] / "checkpoints").glob("step_*"))
    stored = sum(file.stat().st_size for file in newest.glob("*.distcp"))
    everything = sum(t.numel() * 4 for t in load_file(exported(undisturbed[1])).values())
    assert stored < 0.2 * 3 * everything  # a tiny model: its layers outside of blocks weigh much


def test_an_adapted_base_is_exported_as_an_ordinary_network(config, undisturbed):
    plain = load_file(exported(undisturbed[1]))
    base = load_file(config.parent / "base/export/student.safetensors")
    assert plain.keys() == base.keys()
    changed = {name for name in base if not torch.equal(plain[name], base[name])}
    assert "blocks.0.attn.qkv.weight" in changed  # B A was folded in
    assert not any(".mlp." in name or ".norm" in name for name in changed if "blocks" in name)


def test_a_base_that_was_exchanged_is_refused(config):
    run, file = config.parent / "exchanged", config.parent / "other.safetensors"
    base = load_file(config.parent / "base/export/student.safetensors")
    save_file(base, file)
    words = [f"output={run}", f"method.weights={file}", "train.steps=3"]
    succeeds("train", config, *words)
    save_file(base | {"blocks.0.mlp.fc1.bias": base["blocks.0.mlp.fc1.bias"] + 1}, file)
    more = ["train.steps=6", "train.changed_config=accept"]
    for verb in (["train", config, *words, *more], ["score", run]):
        outcome = kdad(*verb)
        assert outcome.codes == [1] and "base" in outcome.text


def test_how_a_run_is_read_may_change_and_what_it_trains_may_not(config, undisturbed):
    run = undisturbed[1]
    succeeds("train", config, f"output={run}", "method.inference.pattern=diagonal")
    outcome = kdad("train", config, f"output={run}", "method.lora.rank=8", "method.mask_ratio=0.5")
    assert outcome.codes == [2]
    assert "method.lora.rank: 4 in the run, 8 now" in outcome.text
    assert "method.mask_ratio: 0.75 in the run, 0.5 now" in outcome.text
    succeeds("score", run, "method.inference.pattern=random", "method.inference.partitions=2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.image_size=30"], "24 and 32"),
        (["method.preset=mae_vit_large_patch17"], "did you mean"),
        (["method.inference.masks=3"], "does not divide a grid of 4 x 4"),
        (["method.inference.pattern=lattice", "method.inference.masks=2"], "lattice"),
        (["method.mask_ratio=0.99"], "leaves 0 of 16 patches visible"),
        (["method.lora.targets=[attn.q]"], "attn.qkv, attn.proj, mlp.fc1, mlp.fc2"),
        (["method.weights=absent.safetensors"], "method.weights"),
        (["method.weights=mae_pretrain_vit_large_full.pth"], "download it"),
        (
            [
                "method.preset=mae_vit_small_patch7",
                "data.image_size=35",
                "data.augment.crop_margin=1",
            ],
            "does not fit",
        ),
        (["method.weights=random"], "never trained"),
        (["method.cache_teacher=true"], "not a known key"),
        (["optim.lr=1e30", "data.augment.crop_margin=0"], "is not finite"),
    ],
)
def test_a_run_that_cannot_work_is_refused_with_the_reason(config, words, said):
    run = config.parent / "refused"
    outcome = kdad("train", config, f"output={run}", *words)
    assert outcome.codes[0] in (1, 2) and said in outcome.text, outcome.text
    assert not list(run.glob("checkpoints/*")) and "Traceback" not in outcome.text
    shutil.rmtree(run, ignore_errors=True)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", ["text", "pickle"])
def test_a_file_that_holds_no_weights_is_refused_and_never_run(config, content):
    file = config.parent / f"{content}.pth"
    file.write_bytes(b"hello" if content == "text" else pickle.dumps({"model": Code()}))
    outcome = kdad("train", config, f"output={config.parent / 'no'}", f"method.weights={file}")
    assert outcome.codes == [1] and file.name in outcome.text
    assert not Path("executed").exists()


def test_a_batch_larger_than_the_data_is_no_error(config):
    run = config.parent / "large-batch"
    succeeds("train", config, f"output={run}", "train.batch_size=100", "train.steps=2")
    assert len(lines(run)) == 2
