"""A run's detector in the hands of a program: what `kdad score --images` says, without files."""

import csv
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdad_dist import Detector, Predictions, load
from kdad_dist.errors import CheckpointError, ConfigError, DataError, UsageError
from tests.helpers import texture
from tests.kdad import succeeds

pytestmark = pytest.mark.launch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a unit of work has it, on which the last bits depend."""
    torch.set_num_threads(1)


def new(runs: Path) -> list[Path]:
    return sorted((runs / "new").iterdir())


def same(one: Predictions, other: Predictions) -> bool:
    names = [field.name for field in fields(Predictions) if field.name != "seconds"]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("method", ["stfpm", "loramae"])
def test_a_program_gets_what_the_command_writes(runs, tmp_path, method):
    out = tmp_path / "out"
    words = ["--images", runs / "new", "--out", out]
    outcome = succeeds("score", runs / method, "score.save_maps=npy", *words)
    assert "images/s" in outcome.text
    detector = load(runs / method, device="cpu")
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(rows) == 5
    for row in rows:
        result = detector.predict(row["file"])
        assert result.pred_score.tolist() == [float(row["pred_score"])]
        assert result.pred_label is not None and result.anomaly_map is not None
        assert result.pred_label.tolist() == [row["pred_label"] == "1"]
        assert np.array_equal(result.anomaly_map[0], np.load(out / row["map"]))
        if method == "stfpm":
            assert result.reconstruction is None and not row["reconstruction"]
        else:
            shown = np.asarray(Image.open(out / row["reconstruction"]))
            assert result.reconstruction is not None and shown.shape == (32, 32, 3)
            assert np.array_equal(result.reconstruction[0], shown)
    assert (out / "reconstructions").is_dir() == (method == "loramae")


def test_every_kind_of_image_gives_the_same(runs):
    detector = load(str(runs / "stfpm"))
    paths = new(runs)
    said = repr(detector)
    assert str(runs / "stfpm") in said and "stfpm of" in said and len(said.splitlines()) == 1
    expected = detector.predict(paths)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    opened = [Image.open(path) for path in paths]
    mixed = [*arrays[:2], *opened[2:4], paths[4]]
    for images in ([str(path) for path in paths], arrays, opened, mixed, iter(paths)):
        assert same(detector.predict(images), expected)
    squares = np.stack([texture(i, 32, 32) for i in range(3)])
    assert same(detector.predict(squares), detector.predict(list(squares)))
    [one] = detector.predict(squares[0]).pred_score
    assert one == pytest.approx(detector.predict(squares).pred_score[0], rel=1e-4)


def test_an_image_of_pillows_follows_the_rules_of_files(runs, tmp_path):
    detector = load(runs / "stfpm")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    Image.fromarray(texture(1, 30, 50)).save(turned, exif=exif)
    seen_through = np.dstack([texture(2), np.full((40, 48), 100, dtype=np.uint8)])
    Image.fromarray(seen_through).save(clear)
    for path in (turned, clear):
        assert same(detector.predict(Image.open(path)), detector.predict(path))


def test_many_images_go_through_in_parts_and_come_back_in_order(runs):
    whole, parts = load(runs / "loramae"), load(runs / "loramae", ["score.batch_size=2"])
    assert isinstance(whole, Detector)
    one, other = whole.predict(new(runs)), parts.predict(new(runs))
    assert len(other.pred_score) == 5
    np.testing.assert_allclose(other.pred_score, one.pred_score, rtol=1e-4)
    assert other.reconstruction is not None and other.reconstruction.shape == (5, 32, 32, 3)
    assert other.anomaly_map is not None and other.anomaly_map.dtype == np.float32


def test_nothing_is_written(runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    load(runs / "stfpm").predict(new(runs))
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_without_a_threshold_there_are_scores_and_no_labels(runs, tmp_path, caplog):
    run = shutil.copytree(runs / "stfpm", tmp_path / "run")
    changed = load(run, ["method.combine=sum"])  # scores of another kind than the threshold's
    assert changed.predict(new(runs)).pred_label is None
    (run / "metrics.json").unlink()
    result = load(run).predict(new(runs))
    assert result.pred_label is None
    assert len(result.pred_score) == 5


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no image"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "no image"),
        ([texture(1), texture(2).astype(np.float32)], "image 1 is an array of float32"),
        (texture(1)[:, :, 0], "image 0 is an array of uint8 and shape (40, 48)"),
        ([texture(1)[:, :, :2]], "shape (40, 48, 2)"),
        ([np.zeros((0, 8, 3), dtype=np.uint8)], "shape (0, 8, 3)"),
        ([texture(1).astype(np.float32)[:, :, 0]], "an array of float32 and shape (40, 48)"),
        (np.dstack([texture(1), texture(1)[:, :, :1]]), "shape (40, 48, 4)"),
        ([None], "image 0 is a NoneType"),
        (None, "image 0 is a NoneType"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "image 0 is a Tensor"),
        (["nowhere.png"], "nowhere.png cannot be read"),
        (Path(__file__).parent, "integration cannot be read"),
        (Path(__file__), "test_detector.py"),
        ([Image.new("F", (4, 4))], "image 0 has 32 bits"),
    ],
)
def test_what_is_no_image_is_named(runs, images, said):
    with pytest.raises(DataError) as caught:
        load(runs / "stfpm").predict(images)
    assert said in str(caught.value)


def test_a_run_that_cannot_be_loaded_says_why(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(tmp_path)
    run = shutil.copytree(runs / "stfpm", tmp_path / "run")
    with pytest.raises(UsageError, match="other shards"):
        load(run, ["data.shards=elsewhere"])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="train the run first"):
        load(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(runs):
    with pytest.raises(UsageError, match="no GPU"):
        load(runs / "stfpm", device="cuda:1")


def test_importing_the_package_does_not_load_torch():
    code = (
        "import sys, kdad_dist\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(kdad_dist, 'nothing')\n"
        "from kdad_dist import load\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
