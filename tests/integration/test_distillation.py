"""Methods that distil, as a whole: parallel equals serial, resumed equals undisturbed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdad_dist
from kdad_dist.report import write_report
from tests.helpers import texture
from tests.integration.test_scoring import results
from tests.kdad import configured, kdad, lines, succeeds

pytestmark = pytest.mark.launch

METHODS = {
    "mkd": {
        "name": "mkd",
        "teacher": {"backbone": "test_resnet", "weights": "random", "layers": [1, 2, 3]},
        "pool": False,
        "value_weight": 1.0,
        "balance": True,
        "localise": "smoothgrad",
        "noise_copies": 2,
    },
    "vitkd": {
        "name": "vitkd",
        "teacher": {"backbone": "test_vit", "weights": "random", "layers": [1, 2, 3]},
        "student": {"heads": 4, "mlp": 32, "dropout": 0.0},
    },
}


def config_of(method: str) -> dict[str, Any]:
    return {
        "name": method,
        "data": {"image_size": 32, "val_fraction": 0.2},
        "method": METHODS[method],
        "optim": {"name": "sgd", "lr": 0.01},
        "train": {"steps": 6, "batch_size": 6, "log_every": 1, "check_every": 2},
        "score": {"smooth_sigma": 1, "opening": True},
    }


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory) -> Path:
    """A configuration, and beside it its runs on 1 and 2 processes."""
    config = configured(tmp_path_factory.mktemp(request.param), config_of(request.param), size=32)
    for processes in (1, 2):
        run = config.parent / f"run{processes}"
        succeeds("train", config, f"output={run}", processes=processes)
    return config


def test_the_losses_do_not_depend_on_the_number_of_processes(trained):
    for name in ("loss", "value", "direction"):
        one, two = (lines(trained.parent / f"run{n}", name) for n in (1, 2))
        assert len(one) == 6
        assert max(abs(one[step] - two[step]) for step in one) < 1e-5 * max(one.values())


def test_sharding_the_student_or_keeping_the_teachers_output_changes_no_loss(trained):
    one, two = (lines(trained.parent / f"run{n}") for n in (1, 2))
    cached = (one, "ddp", "method.cache_teacher=true")
    for expected, mode, more in ((two, "fsdp2", ""), (two, "zero3", ""), cached):
        run = trained.parent / f"as-{mode}"
        processes = 1 if mode == "ddp" else 2
        words = ["train", trained, f"output={run}", *more.split()]
        succeeds(*words, processes=processes, mode=mode)
        found = lines(run)
        assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5


def test_a_run_that_was_stopped_ends_with_the_losses_of_the_undisturbed_one(trained):
    run = trained.parent / "stopped"
    words = ["train", trained, f"output={run}"]
    assert kdad(*words, "train.max_time=1e-9", processes=2).codes == [75, 75]
    succeeds(*words, processes=2)
    assert lines(run) == lines(trained.parent / "run2")


def test_results_are_the_same_bits_on_any_number_of_processes_and_make_a_page(trained):
    run = trained.parent / "run1"
    succeeds("score", run, "score.save_maps=npy")
    serial = results(run)
    assert len([name for name in serial if name.startswith("scores/maps/")]) == 7
    succeeds("score", run, "score.save_maps=npy", processes=3)
    assert results(run) == serial
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(value is not None for value in metrics["mean"].values())
    assert trained.stem in write_report(run).read_text()
    detector = kdad_dist.load(run)
    said = detector.predict(np.stack([texture(1), texture(2)]))
    assert said.anomaly_map.shape == (2, 32, 32) and said.pred_label is not None
    succeeds("export", run)


@pytest.mark.parametrize("trained", ["mkd"], indirect=True)
def test_without_maps_there_are_scores_and_pixel_metrics_say_why_not(trained, tmp_path):
    run = shutil.copytree(trained.parent / "run1", tmp_path / "run")
    succeeds("score", run)
    scores = [row.split(",")[4] for row in (run / "scores/scores.csv").read_text().splitlines()]
    succeeds("score", run, "method.localise=none")
    rows = (run / "scores/scores.csv").read_text().splitlines()
    assert [row.split(",")[4] for row in rows] == scores
    tile = json.loads((run / "metrics.json").read_text())["categories"]["tile"]
    assert tile["image_auroc"] is not None and tile["pixel_auroc"] is None
    assert "map" in tile["notes"]["pixel_auroc"]
    write_report(run)
    outcome = kdad("score", run, "method.localise=none", "score.standardise=true")
    assert outcome.codes == [1] and "no maps" in outcome.text


@pytest.mark.parametrize("trained", ["vitkd"], indirect=True)
def test_dropout_is_the_same_after_a_resume(trained):
    words = ["train", trained, "method.student.dropout=0.3", "train.steps=3"]
    whole, stopped = (trained.parent / f"dropout-{name}" for name in ("whole", "stopped"))
    succeeds(*words, f"output={whole}", processes=2)
    outcome = kdad(*words, f"output={stopped}", "train.max_time=1e-9", processes=2)
    assert outcome.codes == [75, 75]
    succeeds(*words, f"output={stopped}", processes=2)
    assert lines(stopped) == lines(whole)
    assert lines(whole)[1] != lines(trained.parent / "run2")[1]
