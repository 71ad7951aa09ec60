"""How far two maps of the same image say the same."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HOTTEST = 0.2
"""Share of the pixels that the overlap is of."""
ROUNDING = 1e-6
"""Differences below this share of a map's largest value are of its enlargement, and not its own."""


class Agreement(NamedTuple):
    """Of two maps of an image."""

    correlation: float
    """Pearson's, over the pixels: 1 where one map is the other but for offset and scale."""
    overlap: float
    """Of the hottest fifths: pixels in both over pixels in either."""


def agreement(one: NDArray[np.float32], other: NDArray[np.float32]) -> Agreement | None:
    """How far two maps (h, w) agree; None where one is constant, for it points nowhere."""
    if any(np.ptp(values) <= rounding(values) for values in (one, other)):
        return None
    first, second = (values.astype(np.float64).ravel() for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    correlation = first @ second / np.sqrt((first @ first) * (second @ second))
    hot, also_hot = hottest(one), hottest(other)
    return Agreement(float(correlation), float((hot & also_hot).sum() / (hot | also_hot).sum()))


def hottest(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The fifth of the pixels with the highest values, with all that equal the lowest of these;
    fewer where the rest of the map is at its minimum.
    """
    limit, least = np.quantile(values, 1 - HOTTEST, method="higher"), rounding(values)
    return (values >= limit - least) & (values > values.min() + least)


def rounding(values: NDArray[np.float32]) -> np.float32:
    """The difference up to which two values of a map are the same."""
    return np.float32(ROUNDING) * np.abs(values).max()


def mean_agreement(found: Iterable[Agreement | None]) -> dict[str, float | int | None]:
    """The means over images, and how many images had none to measure."""
    every = list(found)
    known = [one for one in every if one is not None]
    means = np.mean(known, axis=0).tolist() if known else [None, None]
    return {
        "correlation": means[0],
        "overlap": means[1],
        "images": len(known),
        "without": len(every) - len(known),
    }
