"""Metrics of image scores, and the rates that a threshold gives."""

import numpy as np
import pytest

from kdad_dist.metrics.image import f1_max, image_metrics, image_roc, rates

LABELS = [0, 0, 0, 1, 1]
SCORES = [0.1, 0.4, 0.2, 0.3, 0.9]


def test_the_metrics_of_five_images_are_those_worked_out_by_hand():
    metrics = image_metrics(LABELS, SCORES)
    assert metrics["image_auroc"] == pytest.approx(5 / 6)
    assert metrics["image_ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["image_f1_max"] == pytest.approx(0.8)  # threshold 0.3: 2 of 3, and 2 of 2


def test_scores_of_any_sign_are_ranked():
    shifted = [score - 5 for score in SCORES]
    assert image_metrics(LABELS, shifted) == image_metrics(LABELS, SCORES)


def test_f1_of_images_that_are_all_defective_is_one():
    assert f1_max([1, 1], [0.2, 0.1]) == 1


def test_the_area_below_the_curve_is_the_auroc():
    assert image_roc(LABELS, SCORES).area() == pytest.approx(5 / 6)


def test_a_score_at_the_threshold_is_not_reported():
    assert rates(LABELS, SCORES, 0.3) == {
        "false_positive_rate": pytest.approx(1 / 3),
        "true_positive_rate": pytest.approx(1 / 2),
    }


def test_a_rate_of_no_images_is_none():
    assert rates([0, 0], [1.0, 3.0], 2.0) == {
        "false_positive_rate": 0.5,
        "true_positive_rate": None,
    }
    assert rates(np.array([1]), np.array([3.0]), 2.0)["false_positive_rate"] is None
