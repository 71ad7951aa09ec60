"""Trackers of real trainings: killed, stopped, resumed, scored, on two processes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tests.helpers import make_mvtec
from tests.kdad import Launched, kdad, succeeds, until

pytestmark = pytest.mark.launch
SECRET = "5ec2e7" * 6 + "0000"

CONFIG = {
    "name": "tracked",
    "data": {"image_size": 32},
    "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]}},
    "optim": {"name": "adam", "lr": 1.0e-3},
    "train": {"steps": 120, "batch_size": 4, "log_every": 1, "check_every": 1},
    "checkpoint": {"every_steps": 4},
    "track": {"wandb": "offline", "tensorboard": True, "media": True},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("tracking")
    make_mvtec(folder / "images", train=12)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    data = {**CONFIG["data"], "shards": str(folder / "shards")}
    path = folder / "tracked.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "data": data}))
    return path


def with_a_key() -> None:
    os.environ["WANDB_API_KEY"] = SECRET


@pytest.fixture(scope="module")
def run(config) -> Path:
    """A run on two processes that was killed, stopped, brought to its end, and scored."""
    run = config.parent / "run"
    words = ["train", config, f"output={run}"]
    killed = Launched(words, 2, with_a_key)
    until(killed, lambda: len(list(run.glob("checkpoints/step_*"))) > 1)
    killed.kill()
    killed.wait()
    assert not (run / "wandb").exists()
    before = (run / "metrics.jsonl").stat().st_size
    stopped = Launched(words, 2, with_a_key)
    until(stopped, lambda: (run / "metrics.jsonl").stat().st_size > before)
    stopped.kill(signal.SIGTERM)
    outcome = stopped.wait()
    assert outcome.codes == [75, 75], outcome.text
    outcome = kdad(*words, processes=2, first=with_a_key)
    assert outcome.codes == [0, 0], outcome.text
    (run / "said").write_text(outcome.text)
    return run


def logged(run: Path) -> dict[int, dict[str, float]]:
    """What metrics.jsonl says of each step; every name once."""
    found: dict[int, dict[str, float]] = {}
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        step = found.setdefault(record.pop("step"), {})
        step |= record if not step.keys() & record.keys() - {"epoch"} else {"twice": 1}
    return found


def test_the_parts_of_weights_and_biases_hold_what_the_log_holds_each_step_once(run):
    from tests.wandb_file import read_history

    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert all(part.name.endswith((run / "wandb_id").read_text()) for part in parts)
    rows = [{k: json.loads(v) for k, v in row.items()} for p in parts for row in read_history(p)]
    log = logged(run)
    assert [row["_step"] for row in rows] == list(log) == [*range(1, 121)]
    for row in rows:
        theirs = {name: value for name, value in row.items() if not name.startswith("_")}
        ours = log[row["_step"]]
        missing = ours.keys() - theirs.keys()
        assert missing <= {"save_seconds", "val_loss"}  # noted after the start had ended
        assert theirs == pytest.approx({k: v for k, v in ours.items() if k not in missing})


def test_tensorboard_holds_what_the_log_holds(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(
        {step: values["loss"] for step, values in logged(run).items()}
    )


def test_no_secret_stands_in_the_run_or_in_what_was_said(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_scoring_adds_figures_table_and_examples_to_the_same_run(run):
    from tests.wandb_file import read_records

    copy = shutil.copytree(run, run.parent / "scored")
    before = set((copy / "wandb").iterdir())
    succeeds("score", copy, processes=2)
    [part] = set((copy / "wandb").iterdir()) - before
    assert part.name.endswith((copy / "wandb_id").read_text())
    assert not list(copy.glob(".wandb.*"))
    summary = {
        item.key: json.loads(item.value_json)
        for record in read_records(part)
        if record.HasField("summary")
        for item in record.summary.update
    }
    mean = json.loads((copy / "metrics.json").read_text())["mean"]
    assert summary["scores/pixel_auroc"] == mean["pixel_auroc"]
    assert summary["scores/categories"]["nrows"] == 1
    examples = json.loads((copy / "scores/examples/examples.json").read_text())
    assert summary["scores/examples"]["count"] == 2 * len(examples)
    assert len(list(part.rglob("*.png"))) == 2 * len(examples)
    assert not [row for row in read_records(part) if row.HasField("history")]


def test_a_training_whose_tracker_cannot_write_goes_on(config):
    run = config.parent / "blocked"
    run.mkdir()
    (run / "wandb").write_text("a file where a folder should be")
    outcome = succeeds("train", config, f"output={run}", "train.steps=8", "track.tensorboard=false")
    assert "Weights & Biases is off" in outcome.text
    assert "Traceback" not in outcome.text
    assert list(logged(run)) == [*range(1, 9)]
