"""`kdad sweep` on this machine: failures, restarts, stops."""

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import make_mvtec
from tests.kdad import Launched, kdad, succeeds

pytestmark = pytest.mark.launch

ODD = "wo od $(touch x) 'q\""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sweep")
    for category in (ODD, "tile"):
        make_mvtec(place / "images", category, train=8, good=2, scratch=2)
    succeeds("pack", place / "images", place / "shards", "--size", 32)
    values = {
        "name": "many",
        "output": str(place / "many"),
        "data": {"shards": str(place / "shards"), "image_size": 32},
        "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1]}},
        "optim": {"name": "adam", "lr": 1.0e-3},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "check_every": 1},
    }
    path = place / "many.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def test_a_failing_class_does_not_stop_the_rest_and_is_made_up_for_later(config):
    sweep, shards = config.parent / "many", config.parent / "shards"
    [broken] = shards.glob("tile-train-*.tar")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:1000])
    failed = kdad("sweep", config, "--jobs", 2)
    assert failed.codes == [1], failed.text
    assert "1 of 2 runs failed" in failed.text and broken.name in failed.text
    table = json.loads((sweep / "table.json").read_text())
    [missing] = table["missing"]
    assert (missing["category"], missing["state"]) == ("tile", "not started")
    assert broken.name in missing["reason"]
    assert table["categories"][ODD]["image_auroc"]["mean"] is not None
    assert (sweep / ODD / "report.html").is_file()

    broken.write_bytes(whole)
    kept = (sweep / ODD / "metrics.json").stat().st_mtime_ns
    succeeds("sweep", config)
    assert json.loads((sweep / "table.json").read_text())["complete"]
    assert (sweep / ODD / "metrics.json").stat().st_mtime_ns == kept


def test_a_sweep_that_is_asked_to_stop_leaves_with_75_and_goes_on(config):
    words = ["sweep", config, "name=stopped", f"output={config.parent / 'stopped'}"]
    words += ["--categories", "tile", "train.steps=120"]
    sweep = config.parent / "stopped"
    launched = Launched([*words, "--seeds", 2], 1)
    lines = sweep / "tile/metrics.jsonl"
    while not (lines.is_file() and lines.stat().st_size):
        assert launched.ranks[0].is_alive(), launched.wait().text
        time.sleep(0.05)
    (sweep / "PREEMPT").touch()
    stopped = launched.wait()
    assert stopped.codes == [75], stopped.text
    assert state(sweep / "tile") == "preempted"
    assert not (sweep / "tile-seed1").exists()

    done = kdad(*words)
    assert done.codes == [0], done.text
    assert "going on from step" in (sweep / "tile.log").read_text()
    assert state(sweep / "tile") == "finished"
