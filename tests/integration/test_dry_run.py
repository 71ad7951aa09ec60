"""`kdad train --dry-run`: what it foretells comes true, and what it refuses `train` refuses too."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from kdad_dist.data.plan import Plan
from tests.helpers import make_mvtec
from tests.kdad import Launched, Outcome, kdad, succeeds

pytestmark = pytest.mark.launch

CONFIG = {
    "name": "tiny",
    "data": {"image_size": 32, "val_fraction": 0},
    "method": {
        "name": "stfpm",
        "teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]},
    },
    "optim": {"name": "adam", "lr": 0.03, "schedule": "cosine"},
    "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "log_every": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """19 images to train on, 8 in a step, the last step 3."""
    folder = tmp_path_factory.mktemp("dry")
    make_mvtec(folder / "images", train=19, good=1, scratch=1)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    path = folder / "tiny.yaml"
    values = {**CONFIG, "output": str(folder / "run")}
    values["data"] = {**CONFIG["data"], "shards": str(folder / "shards")}
    path.write_text(yaml.safe_dump(values))
    return path


def document(outcome: Outcome) -> dict:
    """The JSON that a command printed among other lines."""
    text = outcome.text
    return json.loads(text[text.index("{\n") : text.rindex("}") + 1])


def foretold(config: Path, *words: object) -> dict:
    return document(succeeds("train", config, "--dry-run", "--json", *words))


def cached() -> set[Path]:
    return set(Path(os.environ["KDAD_CACHE"]).rglob("*"))


def test_a_training_comes_out_as_foretold(config, tmp_path):
    run, before = tmp_path / "run", cached()
    facts = foretold(config, f"output={run}")
    assert not run.exists() and cached() == before, "something was left behind"
    assert facts["run"]["step"] == 0
    said = succeeds("train", config, f"output={run}").text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert facts["steps"] == {"per_epoch": 3, "total": len(rates), "epochs": 2.0}
    for rate in facts["learning_rate"]:
        assert rate["lr"] == pytest.approx(rates[rate["step"]])
    [checkpoint] = (run / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    written = sum(entry["bytes"] for entry in manifest["files"].values())
    assert facts["checkpoint"]["bytes"] == pytest.approx(written, rel=0.03)
    assert "memory of a process, beside activations: weights" in said
    assert said.count("the teacher's weights are random") == 1
    assert [note for note in facts["notes"] if "the teacher's weights are random" in note]
    assert foretold(config, f"output={run}")["run"]["step"] == 6


def test_every_process_is_told_its_rows(config):
    facts = foretold(config, "--processes", 2, "--mode", "fsdp2", "train.micro_batch_size=2")
    assert (facts["processes"], facts["mode"]) == (2, "fsdp2")
    images = [0, 0]
    for rank in (0, 1):
        plan = Plan(19, batch_size=8, rank=rank, world=2, micro_batch_size=2)
        steps = [[len(part.rows) for part in parts] for parts in plan.steps(0, 3)]
        images[rank] = sum(map(sum, steps))
        for name, parts in (("full", steps[0]), ("last", steps[-1])):
            assert facts["batches"][name]["rows"][rank] == sum(parts)
            assert facts["batches"][name]["passes"] == len(parts)
            assert facts["batches"][name]["largest_pass"] >= max(parts)
    assert facts["batches"]["images_of_an_epoch"] == images
    alone = foretold(config, "train.micro_batch_size=2")["memory"]
    assert facts["memory"]["optimizer"] == alone["optimizer"] // 2
    assert facts["memory"]["activations"] == alone["activations"]


def test_processes_without_images_are_named_and_so_are_gpus_that_are_needed(config):
    outcome = succeeds("train", config, "--dry-run", "--processes", 12, "train.precision=fp16")
    assert "of a process: 1 (8 of 12), 0 (4 of 12)" in outcome.text
    assert "4 of 12 processes have no image in a full step" in outcome.text
    assert "fp16 needs GPUs" in outcome.text
    outcome = succeeds("train", config, "--dry-run", "--processes", 3, "data.access=stream")
    assert "1 of 3 processes have no image in a full step" in outcome.text
    assert "there are too few" in outcome.text
    outcome = succeeds("train", config, "--dry-run", "--processes", 3)
    assert "losses are weighted by images" in outcome.text


def test_a_large_network_is_measured_without_being_built(config):
    recipe = ["loramae_mvtec", f"data.shards={config.parent / 'shards'}", "data.category=tile"]
    recipe += ["data.image_size=28", "method.weights=random", "method.freeze_random=true"]
    facts = document(succeeds("train", *recipe, "--dry-run", "--json", "--processes", 8))
    assert 1.2e9 < facts["memory"]["weights"] < 1.5e9
    assert facts["checkpoint"]["bytes"] < 0.02 * facts["memory"]["weights"]


REFUSED: dict[str, tuple[list[str], int]] = {
    "category": (["data.category=cork"], 2),
    "size": (["data.image_size=64", "method.teacher.weights=gone.safetensors"], 2),
    "margin": (["data.augment.crop_margin=9"], 2),
    "layers": (["method.teacher.layers=[2,9]"], 2),
    "weights": (["method.teacher.weights=gone.safetensors"], 1),
    "start": (["train.init_from=gone.safetensors"], 1),
    "targets": (["method.cache_teacher=true", "data.access=stream"], 2),
    "shards": (["data.shards=nowhere"], 1),
}


def message(outcome: Outcome) -> str:
    assert "Traceback" not in outcome.text, outcome.text
    return outcome.text.partition("kdad: ")[2].strip()


def test_what_training_refuses_is_refused_in_the_same_words(config, tmp_path):
    launched = {}
    for name, (words, _) in REFUSED.items():
        common = ["train", config, f"output={tmp_path / name}", *words]
        launched[name] = Launched(common, 1), Launched([*common, "--dry-run"], 1)
    for name, (trained, dry) in launched.items():
        outcomes = trained.wait(), dry.wait()
        assert [outcome.codes for outcome in outcomes] == 2 * [[REFUSED[name][1]]], outcomes
        said, also = map(message, outcomes)
        assert said and said == also


def test_a_shard_that_is_missing_or_cut_short_is_refused(config, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(config.parent / "shards", shards)
    file = next(iter(shards.glob("*train*.tar")))
    words = ["train", config, f"data.shards={shards}", f"output={tmp_path / 'run'}", "--dry-run"]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    outcome = kdad(*words)
    assert outcome.codes == [1] and "do not match the index" in message(outcome)
    file.unlink()
    outcome = kdad(*words)
    assert outcome.codes == [1] and "cannot be read" in message(outcome)


def test_a_run_of_another_configuration_or_teacher_is_refused(config, tmp_path):
    run = tmp_path / "run"
    words = ["train", config, f"output={run}", "train.epochs=1"]
    succeeds(*words)
    outcome = kdad(*words, "--dry-run", "optim.lr=0.1")
    assert outcome.codes == [2] and "optim.lr" in message(outcome)
    outcome = kdad(*words, "--dry-run", "seed=1", "train.changed_config=accept")
    assert outcome.codes == [1] and "is of another run" in message(outcome)


def test_modes_that_cannot_train_so_are_refused(config):
    words = ["train", config, "--dry-run", "train.precision=fp16", "--mode"]
    outcome = kdad(*words, "zero2")
    assert outcome.codes == [2] and "fp16" in message(outcome)
    assert kdad(*words, "zero9").codes == [2]


def test_options_of_a_dry_run_go_with_it(config):
    for option in (["--processes", 2], ["--mode", "ddp"], ["--json"]):
        outcome = kdad("train", config, *option)
        assert outcome.codes == [2] and "go with --dry-run" in message(outcome)
    assert not (config.parent / "run").exists()
