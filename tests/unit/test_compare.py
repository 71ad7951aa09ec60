"""Where `kdad compare` sees runs differ."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from kdad_dist.compare.differences import compare, ranked
from kdad_dist.compare.text import told
from kdad_dist.errors import DataError, UsageError
from tests.helpers_run import make_run, write_json


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs with the same results."""
    return make_run(tmp_path / "one"), make_run(tmp_path / "two", name="other")


def rescore(run: Path, **scores: float | None) -> None:
    """Gives images, by the end of their keys, another score; None leaves them out."""
    path = run / "scores/scores.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    named = {row["key"].replace("/", "_").removeprefix("tile_"): row for row in rows}
    for key, score in scores.items():
        named[key]["pred_score"] = "gone" if score is None else str(score)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in rows if row["pred_score"] != "gone")


def test_runs_of_the_same_kind_and_results_differ_in_nothing(runs):
    facts = compare(runs, 10)
    assert facts["notes"] == []
    assert facts["config"] == {}
    assert facts["images"] == {"normal": [], "anomalous": []}
    assert facts["metrics"]["category tile"]["image_auroc"][0] > 0.9
    assert "configuration: no difference" in told(facts)


def test_what_one_may_choose_by_stands_last_where_a_run_has_it(runs):
    path = runs[1] / "metrics.json"
    metrics = json.loads(path.read_text())
    write_json(path, metrics | {"synthetic": metrics["mean"] | {"image_auroc": 0.625}})
    facts = compare(runs, 10)
    assert facts["metrics"]["synthetic"]["image_auroc"] == [None, 0.625]
    figures = told(facts).split("\n\n")[1].splitlines()
    assert ["held-out,", "synthetic", "defects", "image", "AUROC", "-", "0.6250"] in [
        line.split() for line in figures[-6:]
    ]


def test_keys_that_differ_are_named_with_both_values(runs):
    path = runs[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["method"]["teacher"]["backbone"] = "resnet50"
    config["method"]["extra"] = [1, 2]
    path.write_text(yaml.safe_dump(config))
    facts = compare(runs, 10)
    assert facts["config"] == {
        "method.teacher.backbone": ["resnet18", "resnet50"],
        "method.extra": [None, [1, 2]],
    }
    lines = told(facts).splitlines()
    assert ["method.teacher.backbone", "resnet18", "resnet50"] in [line.split() for line in lines]


def test_images_are_ranked_within_each_run_and_both_labels_shown(runs):
    for run, factor in zip(runs, (1, 100), strict=True):  # scores have no common scale
        path = run / "scores/scores.csv"
        rows = list(csv.DictReader(path.read_text().splitlines()))
        keys = {row["key"].replace("/", "_").removeprefix("tile_"): row for row in rows}
        rescore(run, **{key: factor * float(row["pred_score"]) for key, row in keys.items()})
    rescore(runs[1], good_002=1e9, crack_005=0.0)
    facts = compare(runs, 1)
    [normal], [anomalous] = facts["images"]["normal"], facts["images"]["anomalous"]
    assert (normal["key"], normal["ranks"][1], normal["of"]) == ("tile/good/002", 1, 70)
    assert normal["ranks"][0] > 20
    assert (anomalous["key"], anomalous["ranks"][1]) == ("tile/crack/005", 70)
    assert [Path(p).is_file() for p in normal["pictures"]] == [True, True]
    text = told(facts)
    [row] = [line.split() for line in text.splitlines() if line.startswith("tile/good/002  good")]
    assert row[-1] == normal["pictures"][0] and normal["pictures"][1] not in text


def test_equal_scores_share_their_rank():
    assert ranked([0.5, 2.0, 0.5, 1.0, 0.5]).tolist() == [4, 1, 4, 2, 4]


def test_results_on_different_data_are_not_taken_for_comparable(runs):
    for run, print_ in zip(runs, ("a" * 64, "b" * 64), strict=True):
        write_json(run / "data.json", {"fingerprint": print_})
    path = runs[1] / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["provenance"]["fingerprint"] = "c" * 64
    write_json(path, metrics)
    rescore(runs[1], good_001=None)
    trained, scored, other = compare(runs, 10)["notes"]
    assert trained == f"trained on different data ({runs[0]} on aaaaaaaa, {runs[1]} on bbbbbbbb)"
    assert "on cccccccc): the figures are not of the same images" in scored
    assert "two 69), of which 69 are the same" in other


def test_a_run_that_is_not_scored_is_compared_as_far_as_it_goes(runs, tmp_path):
    new = make_run(tmp_path / "new", scored=False)
    facts = compare([*runs, new], 10)
    assert facts["notes"] == [f"{new} is not scored yet: kdad score {new}"]
    assert facts["metrics"]["mean"]["pixel_aupro"][2] is None
    assert facts["images"]["normal"] == []
    assert "second - first" not in told(facts)


def test_one_run_is_not_enough_and_a_damaged_one_is_named(runs):
    with pytest.raises(UsageError, match="one run alone"):
        compare(runs[:1], 10)
    (runs[1] / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="two/metrics.json is damaged"):
        compare(runs, 10)
