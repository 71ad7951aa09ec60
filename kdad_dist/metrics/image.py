"""Metrics of whole images: one label and one score each, few enough for scikit-learn."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from kdad_dist.metrics.curves import Curve

Labels = Sequence[int] | NDArray[np.int_]
Scores = Sequence[float] | NDArray[np.floating]


def image_metrics(labels: Labels, scores: Scores) -> dict[str, float]:
    """AUROC, average precision and best F1 of scores that hold both labels, 0 and 1."""
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1_max": f1_max(labels, scores),
    }


def f1_max(labels: Labels, scores: Scores) -> float:
    """The largest F1 over all thresholds. It looks at the labels: a bound, not a result."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    return float(np.max(2 * precision * recall / np.where(total > 0, total, 1)))


def image_roc(labels: Labels, scores: Scores) -> Curve:
    """The ROC curve of scores that hold both labels."""
    false_positive_rate, true_positive_rate, _ = roc_curve(labels, scores)
    return Curve(false_positive_rate, true_positive_rate)


def rates(labels: Labels, scores: Scores, threshold: float) -> dict[str, float | None]:
    """The share of normal and of defective images whose score exceeds the threshold.

    None where there is no image of that label.
    """
    defective, reported = np.asarray(labels) == 1, np.asarray(scores) > threshold

    def share(of: NDArray[np.bool_]) -> float | None:
        return float(np.mean(reported[of])) if of.any() else None

    return {"false_positive_rate": share(~defective), "true_positive_rate": share(defective)}
