"""Large images by their tiles, from training to the program that judges a new one."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kdad_dist import load
from tests.helpers import texture
from tests.integration.test_scoring import until_killed
from tests.kdad import Launched, Outcome, configured, kdad, lines, succeeds, until, weights

pytestmark = pytest.mark.launch

CONFIG = {
    "name": "tiny",
    "data": {"image_size": 64, "tile": 32, "tile_overlap": 8},
    "method": {
        "name": "stfpm",
        "cache_teacher": True,
        "teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]},
    },
    "optim": {"name": "adam", "lr": 1.0e-3},
    "train": {"epochs": 1, "batch_size": 40, "log_every": 1},
    "score": {"smooth_sigma": 1, "save_maps": "npy"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """20 normal images, of which some are held out; each has 9 tiles."""
    return configured(tmp_path_factory.mktemp("tiles"), CONFIG, 64)


@pytest.fixture(scope="module")
def run(config) -> Path:
    folder = config.parent / "run"
    succeeds("train", config, f"output={folder}", processes=2)
    return folder


def found(run: Path) -> dict[str, bytes]:
    files = [run / "scores/scores.csv", *sorted((run / "scores/maps").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def document(outcome: Outcome) -> dict:
    return json.loads(outcome.text[outcome.text.index("{\n") : outcome.text.rindex("}") + 1])


def test_a_training_takes_each_tile_once_as_its_dry_run_says(config, run):
    facts = document(succeeds("train", config, "--dry-run", "--json", "--processes", 2))
    data = facts["data"]
    assert (data["tiles_per_image"], data["network_size"], data["image_size"]) == (9, 32, 64)
    tiles = 9 * data["training_images"]
    assert sum(facts["batches"]["images_of_an_epoch"]) == tiles
    assert data["pixel_cache_bytes"] == 20 * 3 * 64**2, "decoded images, not their tiles"
    assert facts["steps"]["total"] == -(-tiles // 40)
    seen = lines(run, "samples_seen")
    assert (max(seen), seen[max(seen)]) == (facts["steps"]["total"], tiles)


def test_a_training_cut_short_within_an_image_goes_on_to_the_same_bits(config, run):
    cut = config.parent / "cut"
    words = ["train", config, f"output={cut}", "train.epochs=null"]
    succeeds(*words, "train.steps=2", processes=2)
    assert max(lines(cut)) == 2 and 2 * 40 % 9, "the step ends within the tiles of an image"
    alone = shutil.copytree(cut, config.parent / "alone")
    words += [f"train.steps={max(lines(run))}", "train.changed_config=accept"]
    succeeds(*words, processes=2)
    assert lines(cut) == lines(run) and weights(cut) == weights(run)
    succeeds(*words, f"output={alone}")
    assert lines(alone) == pytest.approx(lines(run), rel=1e-5)


def test_maps_of_tiles_are_the_same_bits_on_any_number_of_processes_and_after_a_kill(config, run):
    succeeds("score", run)
    alone = found(run)
    launched = Launched(["score", run], 2, first=partial(until_killed, 5))
    until(launched, lambda: len(list(run.glob("scores.partial/parts/[!.]*"))) >= 3)
    launched.kill()
    launched.wait()
    assert "going on: " in succeeds("score", run, processes=3).text
    assert found(run) == alone
    provenance = json.loads((run / "metrics.json").read_text())["provenance"]
    assert "tile 32" in provenance["readout"] and "tile_overlap 8" in provenance["readout"]
    images = sorted((config.parent / "images/tile/test").rglob("*.png"))
    said = load(run, device="cpu").predict(images)
    assert said.anomaly_map is not None and said.anomaly_map.shape == (7, 64, 64)
    rows = list(csv.DictReader((run / "scores/scores.csv").open()))
    written = {row["key"].rsplit("test/", 1)[1]: float(row["pred_score"]) for row in rows}
    here = [written["/".join(image.with_suffix("").parts[-2:])] for image in images]
    np.testing.assert_allclose(said.pred_score, here, rtol=1e-6)
    assert said.pred_label is not None
    other = load(run, ["data.tile_overlap=16"], device="cpu")
    assert other.threshold.value is None, "the threshold is of another overlap"


def test_a_run_may_be_read_whole_or_in_other_tiles_than_it_was_trained_with(run):
    whole = load(run, ["data.image_size=32", "data.tile=null"], device="cpu")
    large = texture(7, 64, 64)
    assert whole.predict(large).anomaly_map.shape == (1, 32, 32)
    words = ["score.smooth_sigma=0", "data.tile_overlap=0"]
    tiled = load(run, words, device="cpu").predict(large).anomaly_map
    plain = load(run, ["data.image_size=32", "data.tile=null", words[0]], device="cpu")
    corner = plain.predict(np.ascontiguousarray(large[:32, :32])).anomaly_map
    np.testing.assert_allclose(tiled[:, :32, :32], corner, rtol=1e-4)


def test_a_tile_that_does_not_fit_the_network_or_the_images_is_refused(config, tmp_path):
    outcome = kdad("train", config, f"output={tmp_path / 'a'}", "data.tile=128")
    assert outcome.codes == [2] and "larger than image_size 64" in outcome.text
    outcome = kdad("train", config, f"output={tmp_path / 'b'}", "data.image_size=128")
    assert outcome.codes == [2] and "--size 128" in outcome.text
