"""A window in the centre of each image: learnt from around it, judged in it alone, everywhere."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from kdad_dist import Detector, load
from kdad_dist.config.load import load_run
from kdad_dist.data.reader import Fit
from kdad_dist.detector import Threshold
from kdad_dist.export.write import export
from kdad_dist.predict import Predictor, unique_names
from kdad_dist.score.results import warn_of_unseen_defects
from tests.helpers import texture
from tests.integration.test_scoring import results
from tests.kdad import succeeds

pytestmark = pytest.mark.launch
WINDOW = ["data.image_size=24", "data.centre_margin=8"]
AT_RANDOM = ["data.augment.crop_margin=8", "data.augment.flip=true"]
INSIDE = slice(4, 28), slice(4, 28)
"""Of the 32 pixels that were packed."""


@pytest.fixture(scope="module")
def run(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on random windows, by two processes, and scored by one, with maps."""
    folder = tmp_path_factory.mktemp("window") / "run"
    words = [f"output={folder}", *WINDOW, *AT_RANDOM]
    succeeds("train", runs / "stfpm.yaml", *words, processes=2)
    succeeds("score", folder, "score.save_maps=npy")
    return folder


@pytest.fixture(scope="module")
def images(runs: Path) -> list[Path]:
    """The test images as they were before they were packed, in the order of the test set."""
    return sorted((runs / "images/tile/test").rglob("*.png"))


def scores(run: Path) -> dict[str, float]:
    rows = csv.DictReader((run / "scores/scores.csv").open())
    return {row["key"].rsplit("test/", 1)[1]: float(row["pred_score"]) for row in rows}


def key(image: Path) -> str:
    return f"{image.parent.name}/{image.stem}"


def test_scores_are_those_of_the_window_and_so_are_the_masks(run, images):
    alone = results(run)
    succeeds("score", run, "score.save_maps=npy", processes=2)
    assert results(run) == alone
    detector = load(run, device="cpu")
    said = detector.predict(images)
    written = scores(run)
    np.testing.assert_allclose(said.pred_score, [written[key(i)] for i in images], rtol=1e-6)
    maps = [
        np.load(run / f"scores/maps/tile__test__{key(i).replace('/', '__')}.npy") for i in images
    ]
    np.testing.assert_allclose(said.anomaly_map, maps, rtol=1e-4)
    assert said.anomaly_map is not None and said.anomaly_map.shape == (7, 24, 24)
    masks = np.zeros((7, 24, 24), bool)
    for mask, image in zip(masks, images, strict=True):
        file = image.parents[2] / f"ground_truth/{key(image)}_mask.png"
        if file.exists():
            packed = Image.open(file).resize((32, 32), Image.Resampling.NEAREST)
            mask[:] = np.asarray(packed)[INSIDE] > 0
    metrics = json.loads((run / "metrics.json").read_text())
    expected = roc_auc_score(masks.ravel(), np.stack(maps).ravel())
    assert masks.any() and metrics["mean"]["pixel_auroc"] == pytest.approx(expected, abs=1e-4)
    assert "image_size 24, centre_margin 8" in metrics["provenance"]["readout"]
    assert said.pred_label is not None
    whole = load(run, ["data.centre_margin=0"], device="cpu")
    assert whole.threshold.value is None, "the threshold is of the window"


def test_what_lies_outside_of_the_window_decides_nothing(run):
    detector, packed = load(run, device="cpu"), texture(5, 32, 32)
    other = texture(6, 32, 32)
    other[INSIDE] = packed[INSIDE]
    one, same = (detector.predict(image) for image in (packed, other))
    assert np.array_equal(one.anomaly_map, same.anomaly_map)
    inside = load(run, ["data.centre_margin=0"], device="cpu").predict(packed[INSIDE])
    assert np.array_equal(one.anomaly_map, inside.anomaly_map)


def test_an_export_takes_the_whole_square_and_cuts_the_window_itself(run):
    entry = export(load_run(run), "onnx")
    measured = json.loads((run / "metrics.json").read_text())["mean"]["pixel_auroc"]
    assert entry["parity"]["pixel_auroc"]["run"] == pytest.approx(measured, abs=1e-4)
    assert entry["facts"]["image_size"] == "32"
    session = onnxruntime.InferenceSession(run / "export/detector.onnx")
    squares = np.stack([texture(i, 32, 32) for i in range(3)])
    score, anomaly_map = session.run(None, {"image": squares})
    ours = load(run, device="cpu").predict(squares)
    np.testing.assert_allclose(score, ours.pred_score, rtol=1e-4)
    assert anomaly_map.shape == (3, 24, 24)
    np.testing.assert_allclose(anomaly_map, ours.anomaly_map, atol=1e-4 * anomaly_map.max())


@pytest.mark.parametrize("kind", ["window", "shorter"])
def test_maps_are_drawn_where_the_network_looked(run, runs, tmp_path, kind):
    detector: Detector = load(run, device="cpu")
    if kind == "shorter":
        detector = replace(load(runs / "stfpm", device="cpu"), fit=Fit(32, None, "shorter"))
    detector = replace(detector, threshold=Threshold(0.0, 0.0))  # everything is anomalous
    path = runs / "new/0.png"  # 30 rows of 60 pixels
    [row] = Predictor(detector, tmp_path, unique_names([path]))([path]).rows
    seen = (7, 3, 53, 27) if kind == "window" else (15, 0, 45, 30)
    left, top, right, bottom = seen
    assert json.loads(row["boxes"]) == [list(seen)]
    inside = np.zeros((30, 60), bool)
    inside[top:bottom, left:right] = True
    assert np.array_equal(np.asarray(Image.open(tmp_path / row["mask"])) > 0, inside)
    pair = (path, tmp_path / row["overlay"])
    before, after = (np.asarray(Image.open(file).convert("L"), int) for file in pair)
    changed = abs(before - after)
    assert changed[~inside].mean() < 10 < changed[inside].mean()


def test_defects_that_nobody_looks_at_are_counted_aloud(caplog):
    rows = [{"gt_label": label, "mask_empty": empty} for label, empty in [(1, True), (1, False)]]
    rows += [{"gt_label": 0, "mask_empty": True}, {"gt_label": 1, "mask_empty": None}]
    warn_of_unseen_defects(rows[1:], 8)
    warn_of_unseen_defects(rows, 0)
    assert not caplog.records
    warn_of_unseen_defects(rows, 8)
    assert "1 of 2 defective test images have no defect inside" in caplog.text
