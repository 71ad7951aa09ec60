"""The evaluation of a test set: the same for every partition, and honest about what is missing."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdad_dist.errors import DataError, KdadError
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.metrics.tally import IMAGE_METRICS, METRICS, PIXEL_METRICS


class Image(NamedTuple):
    key: str
    category: str
    defect_type: str | None
    gt_label: int
    pred_score: float
    anomaly_map: np.ndarray | None
    gt_mask: np.ndarray | None


def make_images(seed: int = 0, side: int = 16) -> list[Image]:
    """Two categories with 4 good images and 3 defective ones of each of two kinds."""
    rng = np.random.default_rng(seed)
    images = []
    for category in ("tile", "nüss"):
        for kind, count in ((None, 4), ("crack", 3), ("hole", 3)):
            for i in range(count):
                mask = np.zeros((side, side), bool)
                if kind:
                    y, x = rng.integers(0, side - 5, 2)
                    mask[y : y + 4, x : x + (4 if kind == "hole" else 2)] = True
                anomaly_map = (rng.gamma(2, 1, mask.shape) + 1.5 * mask).astype(np.float32)
                score = float(anomaly_map.max())
                key = f"{category}/{kind or 'good'}/{i:03}"
                images.append(Image(key, category, kind, int(kind is not None), score, anomaly_map,
                                    mask if kind else None))  # fmt: skip
    return images


def evaluate(images: list[Image]) -> Evaluation:
    evaluation = Evaluation()
    for image in images:
        evaluation.update(*image)
    return evaluation


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_report_is_identical_for_any_partition_and_merge_order(data: st.DataObject):
    images = make_images()
    whole = evaluate(images)
    images = data.draw(st.permutations(images))
    owner = data.draw(st.lists(st.integers(0, 3), min_size=len(images), max_size=len(images)))
    parts = [
        evaluate([image for image, mine in zip(images, owner, strict=True) if mine == part])
        for part in range(4)
    ]
    merged = Evaluation()
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    assert merged.report(threshold=5.0) == whole.report(threshold=5.0)
    assert merged.curves() == whole.curves()
    for mine, theirs in zip(merged.labels_and_scores(), whole.labels_and_scores(), strict=True):
        assert mine.tolist() == theirs.tolist()


def test_a_report_has_every_figure_per_category_and_kind_and_their_means():
    report = evaluate(make_images()).report()
    assert sorted(report["categories"]) == ["nüss", "tile"]
    tile = report["categories"]["tile"]
    assert tile["images"] == 10
    assert {kind: entry["images"] for kind, entry in tile["defect_types"].items()} == {
        "crack": 3,
        "hole": 3,
    }
    for entry in (tile, *tile["defect_types"].values()):
        assert all(0 < entry[metric] <= 1 for metric in METRICS)
        assert entry["notes"] == {}
    for metric in METRICS:
        values = [entry[metric] for entry in report["categories"].values()]
        assert report["mean"][metric] == pytest.approx(sum(values) / 2)
    json.dumps(report)


def test_a_kind_of_defect_is_measured_against_the_good_images_of_its_category_alone():
    images = make_images()
    report = evaluate(images).report()["categories"]["tile"]["defect_types"]["crack"]
    only = [i for i in images if i.category == "tile" and i.defect_type in (None, "crack")]
    alone = evaluate(only).report()["categories"]["tile"]
    assert {m: report[m] for m in METRICS} == {m: alone[m] for m in METRICS}


def test_a_category_without_defects_has_no_figures_and_says_why():
    images = [image for image in make_images() if image.category == "nüss" or not image.gt_label]
    report = evaluate(images).report()
    tile = report["categories"]["tile"]
    assert all(tile[metric] is None for metric in METRICS)
    assert tile["notes"] == dict.fromkeys(METRICS, "there are no defective images")
    assert tile["images"] == 4
    assert tile["defect_types"] == {}
    nuss = report["categories"]["nüss"]
    assert report["mean"] == {metric: nuss[metric] for metric in METRICS}


def test_a_mean_over_no_category_is_none():
    images = [image for image in make_images() if not image.gt_label]
    assert evaluate(images).report()["mean"] == dict.fromkeys(METRICS)
    assert Evaluation().report() == {"mean": dict.fromkeys(METRICS), "categories": {}}


def test_without_good_images_the_pixel_metrics_remain():
    tile = evaluate([i for i in make_images() if i.gt_label]).report()["categories"]["tile"]
    assert all(tile[metric] is None for metric in IMAGE_METRICS)
    assert all(tile[metric] is not None for metric in PIXEL_METRICS)
    assert tile["notes"] == dict.fromkeys(IMAGE_METRICS, "there are no good images")


def test_without_masks_the_image_metrics_remain():
    images = [image._replace(gt_mask=None) for image in make_images()]
    report = evaluate(images).report()
    tile = report["categories"]["tile"]
    assert all(tile[metric] is not None for metric in IMAGE_METRICS)
    assert tile["notes"] == dict.fromkeys(PIXEL_METRICS, "no defective image has a mask")
    assert all(report["mean"][metric] is None for metric in PIXEL_METRICS)
    assert evaluate(images).curves()["tile"].keys() == {"roc"}


def test_defective_images_without_a_mask_are_left_out_of_the_pixel_metrics_and_counted():
    images = make_images()
    bare = [
        image._replace(gt_mask=None) if image.key == "tile/hole/001" else image for image in images
    ]
    tile = evaluate(bare).report()["categories"]["tile"]
    without = evaluate([image for image in images if image.key != "tile/hole/001"])
    expected = without.report()["categories"]["tile"]
    assert {m: tile[m] for m in PIXEL_METRICS} == {m: expected[m] for m in PIXEL_METRICS}
    assert tile["notes"]["masks"].startswith("1 of 6 defective images have no mask")
    assert tile["defect_types"]["hole"]["notes"]["masks"].startswith("1 of 3")
    assert tile["defect_types"]["crack"]["notes"] == {}


def test_a_method_without_maps_has_image_metrics():
    images = [image._replace(anomaly_map=None) for image in make_images()]
    tile = evaluate(images).report()["categories"]["tile"]
    assert tile["image_auroc"] is not None
    assert tile["notes"] == dict.fromkeys(PIXEL_METRICS, "the method gives no anomaly map")


def test_masks_that_are_all_empty_or_all_full_leave_no_pixel_metric():
    images = [image for image in make_images() if image.category == "tile"]
    empty = [image._replace(gt_mask=np.zeros((16, 16), bool)) for image in images]
    notes = evaluate(empty).report()["categories"]["tile"]["notes"]
    assert notes == dict.fromkeys(PIXEL_METRICS, "the masks are all empty")
    full = [i._replace(gt_mask=np.ones((16, 16), bool)) for i in images if i.gt_label]
    notes = evaluate(full).report()["categories"]["tile"]["notes"]
    assert notes["pixel_auroc"] == "the masks leave no normal pixel"


def test_anomalous_images_without_a_kind_count_for_the_category_alone():
    images = [image._replace(defect_type=None) for image in make_images()]
    tile = evaluate(images).report()["categories"]["tile"]
    assert tile["images"] == 10
    assert tile["image_auroc"] is not None
    assert tile["defect_types"] == {}


def test_a_threshold_adds_its_rates():
    images = [image for image in make_images() if image.category == "tile"]
    good = sorted(image.pred_score for image in images if not image.gt_label)
    tile = evaluate(images).report(threshold=good[-2])["categories"]["tile"]
    assert tile["false_positive_rate"] == 0.25
    assert 0 < tile["true_positive_rate"] <= 1


def test_curves_are_short_and_end_where_they_should():
    curves = evaluate(make_images(side=64)).curves()["tile"]
    assert curves.keys() == {"roc", "pixel_roc", "pro"}
    for name, x, y in (("roc", "fpr", "tpr"), ("pixel_roc", "fpr", "tpr"), ("pro", "fpr", "pro")):
        assert 2 <= len(curves[name][x]) == len(curves[name][y]) <= 200
    assert curves["pixel_roc"]["fpr"][-1] == curves["pixel_roc"]["tpr"][-1] == 1
    assert curves["pro"]["fpr"][-1] == 0.3
    json.dumps(curves)


def test_stored_bytes_restore_the_evaluation():
    images = make_images()
    whole, half = evaluate(images), evaluate(images[:11])
    restored = Evaluation.unpack(half.pack())
    restored.merge(evaluate(images[11:]))
    assert restored.report() == whole.report()


def test_an_empty_evaluation_can_be_stored_and_merged():
    whole = evaluate(make_images())
    expected = whole.report()
    whole.merge(Evaluation.unpack(Evaluation().pack()))
    assert whole.report() == expected


def test_an_image_is_not_counted_twice():
    image, other = make_images()[:2]
    evaluation = evaluate([image])
    with pytest.raises(AssertionError, match="tile/good/000"):
        evaluation.update(*image)
    with pytest.raises(AssertionError, match="tile/good/000"):
        evaluation.merge(evaluate([other, image]))


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_its_image(score: float):
    with pytest.raises(KdadError, match="tile/good/000"):
        Evaluation().update("tile/good/000", "tile", None, 0, score)


def test_a_map_with_negative_scores_names_its_image_and_leaves_no_trace():
    image = make_images()[0]
    evaluation = Evaluation()
    with pytest.raises(KdadError, match=r"tile/good/000.*negative"):
        evaluation.update(*image._replace(anomaly_map=-image.anomaly_map))
    evaluation.update(*image)
    assert evaluation.report() == evaluate([image]).report()


def test_a_good_image_whose_mask_marks_a_defect_is_refused():
    image = make_images()[0]
    with pytest.raises(DataError, match="tile/good/000 is labelled good"):
        Evaluation().update(*image._replace(gt_mask=np.ones((16, 16), bool)))
