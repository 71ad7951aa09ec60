"""ROC, precision-recall and per-region-overlap curves, and the areas under them.

Everything is computed from `Counts`: how many pixels hold each distinct score. The area is the
exact one for those scores; a histogram's error is only that scores of one bin count as equal.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

PRO_LIMIT = 0.3  # false positive rate up to which MVTec AD integrates the PRO curve


@dataclass(frozen=True)
class Counts:
    """How much lies at each distinct score, from the lowest score to the highest."""

    normal: Integers
    """Pixels outside every ground-truth region."""
    defective: Integers
    """Pixels inside one."""
    overlap: Integers
    """The same, each weighted by 1 / pixels of its region, in any common unit."""


@dataclass(frozen=True)
class Curve:
    """Points from the strictest threshold to the loosest; x never falls."""

    x: Floats
    y: Floats

    def area(self) -> float:
        """By the trapezoid rule, so that a tie between normal and defective counts half."""
        return float(np.trapezoid(self.y, self.x))

    def up_to(self, limit: float) -> "Curve":
        """The part with x <= limit, its last point interpolated linearly."""
        assert self.x[-1] >= limit
        inside = self.x < limit
        y = np.interp(limit, *self._around(limit))
        return Curve(np.append(self.x[inside], limit), np.append(self.y[inside], y))

    def thinned(self, points: int = 200) -> "Curve":
        """At most that many of the points, evenly spaced along the curve, ends included."""
        if len(self.x) <= points:
            return self
        way = np.abs(np.diff(self.x)) + np.abs(np.diff(self.y))
        way = np.concatenate([[0.0], np.cumsum(way)])
        kept = np.searchsorted(way, np.linspace(0, way[-1], points - 1))
        kept = np.unique(np.append(kept, len(way) - 1))
        return Curve(self.x[kept], self.y[kept])

    def _around(self, limit: float) -> tuple[Floats, Floats]:
        """The two points between which the limit lies: the last one below, the first not below."""
        after = int(np.searchsorted(self.x, limit, side="left"))
        between = slice(max(after - 1, 0), after + 1)
        return self.x[between], self.y[between]


def roc(counts: Counts) -> Curve:
    """True positive rate over false positive rate."""
    return Curve(_share_above(counts.normal), _share_above(counts.defective))


def pro(counts: Counts) -> Curve:
    """Per-region overlap over false positive rate: the mean share of a region that is found.

    Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5.2.
    """
    return Curve(_share_above(counts.normal), _share_above(counts.overlap))


def auroc(counts: Counts) -> float:
    """Area under the ROC curve."""
    return roc(counts).area()


def aupro(counts: Counts, limit: float = PRO_LIMIT) -> float:
    """Area under the PRO curve up to a false positive rate, divided by it; neither axis rescaled.

    A perfect map has 1, a constant one limit / 2.
    """
    return pro(counts).up_to(limit).area() / limit


def average_precision(counts: Counts) -> float:
    """Precision at each threshold, weighted by the recall it adds (scikit-learn's definition)."""
    defective = counts.defective[::-1]
    found = np.cumsum(defective)
    reported = found + np.cumsum(counts.normal[::-1])
    at = defective > 0
    return float(np.sum(defective[at] * (found[at] / reported[at])) / found[-1])


def _share_above(counts: Integers) -> Floats:
    """The share that is found when the threshold falls from above the top score to the lowest."""
    found = np.concatenate([[0], np.cumsum(counts[::-1])])
    assert found[-1] > 0, "a rate of nothing is undefined"
    return found / found[-1]
