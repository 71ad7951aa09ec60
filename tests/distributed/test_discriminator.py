"""A classifier and the discriminator of its answers, trained in turns by real processes."""

import json
from pathlib import Path

import pytest
import yaml

from kdad_dist.config.load import load
from kdad_dist.errors import ConfigError
from kdad_dist.train.dry_run import dry_run
from tests.helpers import make_classes
from tests.kdad import kdad, lines, succeeds

pytestmark = pytest.mark.launch
CLASSES = [f"class{i}" for i in range(10)]
CONFIG = {
    "name": "duel",
    "data": {"classes": CLASSES, "image_size": 32, "cache": "none"},
    "method": {
        "name": "classkd",
        "network": {"backbone": "resnet10t", "weights": "random"},
        "distill": "discriminator",
        "turns": {"period": 4, "discriminator": 2},
    },
    "optim": {"name": "adam", "lr": 1e-4, "clip": 1.0},
    "train": {"steps": 7, "batch_size": 20, "log_every": 1, "validate_every": 1},
}
ALONE = ["method.distill=none", "method.teacher=null"]


@pytest.fixture(scope="module")
def duel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration beside its data and a trained teacher."""
    folder = tmp_path_factory.mktemp("duel")
    make_classes(folder / "images", tuple(CLASSES), train=5, test=1)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    config = {**CONFIG, "data": {**CONFIG["data"], "shards": str(folder / "shards")}}
    config["method"] = {**CONFIG["method"], "teacher": {"weights": str(folder / "teacher")}}
    path = folder / "duel.yaml"
    path.write_text(yaml.safe_dump(config))
    succeeds("train", path, *ALONE, f"output={folder / 'teacher'}", "seed=1", "train.steps=3")
    return path


def trained(duel: Path, name: str, processes: int, mode: str, *more: str) -> Path:
    run = duel.parent / name
    words = ["train", duel, f"output={run}", "train.changed_config=accept", *more]
    succeeds(*words, processes=processes, mode=mode)
    return run


def logged(run: Path) -> dict[str, dict[int, float]]:
    names = ("loss", "cross_entropy", "discriminator", "distillation")
    return {name: lines(run, name) for name in names}


def newest(run: Path) -> dict[str, bytes]:
    """The files of the last checkpoint, which are the same for the same weights and moments."""
    folder = max((run / "checkpoints").glob("step_*"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(duel: Path) -> Path:
    return trained(duel, "alone", 1, "ddp")


def test_the_networks_take_turns(alone: Path):
    found = logged(alone)
    assert set(found["discriminator"]) == {1, 2, 5, 6}
    assert set(found["distillation"]) == {3, 4, 7}
    assert set(found["cross_entropy"]) == set(range(1, 8))


def test_who_was_stopped_in_the_middle_of_a_turn_goes_on_to_the_same_bits(duel: Path, alone: Path):
    trained(duel, "resumed", 1, "ddp", "train.steps=5")
    run = trained(duel, "resumed", 1, "ddp")
    assert logged(run) == logged(alone)
    assert newest(run).keys() == newest(alone).keys()
    assert [name for name in newest(run) if newest(run)[name] != newest(alone)[name]] == []


def test_a_training_without_a_turn_of_the_student_is_refused_before_it_starts(duel: Path):
    idle = duel.parent / "idle"
    with pytest.raises(ConfigError, match="the student would never be trained"):
        dry_run(load(duel, ["train.steps=2", f"output={idle}"]), 1, "ddp")
    outcome = kdad("train", duel, "train.steps=2", f"output={idle}")
    assert outcome.codes == [2] and "never be trained" in outcome.text, outcome.text
    assert not idle.exists()


def test_several_processes_learn_what_one_does_across_the_turns(duel: Path, alone: Path):
    trained(duel, "moved", 2, "ddp", "train.steps=5")
    found = logged(trained(duel, "moved", 2, "fsdp2"))
    for name, values in logged(alone).items():
        assert found[name] == pytest.approx(values, abs=1e-5), name


def test_a_run_with_a_discriminator_is_a_teacher_like_any_other(duel: Path, alone: Path):
    words = [f"method.teacher.weights={alone}", "method.distill=hinton", "train.steps=1"]
    taught = trained(duel, "taught", 1, "ddp", *words)
    # What it looks at is compared, with the same bits on any number of processes.
    beside = f"method.beside.weights={duel.parent / 'teacher'}"
    found = set()
    for processes in (1, 3):
        succeeds("score", taught, "method.explain=true", beside, processes=processes)
        metrics = json.loads((taught / "metrics.json").read_text())
        found.add(json.dumps(metrics["agreement"], sort_keys=True))
        found.add((taught / "scores/explained/explained.json").read_text())
    assert len(found) == 2
    for pairs in metrics["agreement"].values():
        assert set(pairs) == {"student_teacher", "student_beside", "teacher_beside"}
        for pair in pairs.values():
            assert pair["images"] + pair["without"] == 10
            assert pair["correlation"] is None or -1 <= pair["correlation"] <= 1
    succeeds("report", taught)
    assert "What the networks look at" in (taught / "report.html").read_text()
