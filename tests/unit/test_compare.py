"""Where `kdad compare` sees runs differ."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from kdad_dist.compare.differences import compare, ranked
from kdad_dist.compare.text import told
from kdad_dist.errors import DataError, UsageError
from kdad_dist.score.classes import CLASS_COLUMNS, measured, write_mistakes
from kdad_dist.score.results import write_scores
from tests.helpers_run import make_run, write_explained, write_json


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


CLASSES = ["cat", "deer", "dog"]


def make_classifier(run: Path, **told: tuple[str, float]) -> Path:
    """A scored classifier of two images of each class, which is right but in what is `told`: by
    image, class and confidence.
    """
    rows = []
    for label, name in enumerate(CLASSES):
        for key in (f"{name}0", f"{name}1"):
            said, confidence = told.get(key, (name, 0.5))
            row = {"key": key, "category": name, "defect_type": "", "gt_label": label}
            row |= {"pred_score": confidence, "pred_label": CLASSES.index(said)}
            rows.append(row | {"class_name": name, "pred_class": said})
    config = {"name": run.name, "method": {"name": "classkd"}}
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(run / "metrics.json", measured(CLASSES, rows, rows[:4]))
    (run / "scores").mkdir()
    write_scores(run / "scores/scores.csv", rows, CLASS_COLUMNS)
    write_mistakes(run / "scores/examples", rows, lambda _: np.zeros((8, 8, 3), np.uint8))
    return run


def test_classifiers_differ_in_accuracy_and_in_the_images_they_take_for_different_classes(tmp_path):
    # Of deer1 the runs are surer; of cat1 and dog0 both say the same, though with other confidence.
    one = make_classifier(tmp_path / "one", deer0=("cat", 0.6), deer1=("dog", 0.9), dog0=("cat", 1))
    two = make_classifier(tmp_path / "two", cat1=("cat", 0.99), dog0=("cat", 0.4))
    write_explained(two)
    facts = compare([one, two], 5)
    assert facts["notes"] == []
    assert facts["metrics"]["mean"] == {"accuracy": [3 / 6, 5 / 6]}
    assert facts["metrics"]["category deer"] == {"accuracy": [0.0, 1.0]}
    assert facts["metrics"]["held_out"] == {"accuracy": [0.5, 1.0]}
    assert facts["metrics"]["agreement gradcam, student_teacher"]["overlap"] == [None, 0.543]
    assert list(facts["images"]) == ["classes"]
    first, second = facts["images"]["classes"]
    assert (first["key"], first["class_name"], first["told"]) == ("deer1", "deer", ["dog", "deer"])
    assert (first["scores"], first["differing"], first["of"]) == ([0.9, 0.5], 2, 6)
    assert second["key"] == "deer0"
    picture, none = first["pictures"]
    assert Path(picture).is_file() and none is None
    lines = [line.split() for line in told(facts).splitlines()]
    assert ["all", "classes", "accuracy", "0.5000", "0.8333", "+0.3333"] in lines
    assert ["held-out", "images", "accuracy", "0.5000", "1.0000", "+0.5000"] in lines
    assert ["deer1", "deer", "dog", "(0.9000)", "deer", "(0.5000)", picture] in lines
    assert "images taken for different classes, 2 of 6" in told(facts)
    assert len(compare([one, two], 1)["images"]["classes"]) == 1
    assert compare([two, two], 5)["images"] == {"classes": []}


def test_a_classifier_and_a_detector_are_said_not_to_compare(runs, tmp_path):
    ways = make_classifier(tmp_path / "ways")
    facts = compare([runs[0], ways, runs[1]], 5)
    assert facts["notes"][0] == (
        f"classes are told apart by {ways}, anomalies are found by {runs[0]}, {runs[1]}: neither "
        "figures nor images of the one kind compare with those of the other"
    )
    assert facts["images"] == {}
    assert facts["metrics"]["mean"]["accuracy"] == [None, 1.0, None]
    assert facts["metrics"]["mean"]["image_auroc"][1] is None
    assert "taken for" not in told(facts) and "judged" not in told(facts)


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
    assert "normal images judged most differently: their ranks among all 70 images" in text
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
