"""Pixel scores as mergeable counts, from which every pixel metric follows.

A pixel is counted under the top 20 bits of its float32 score. For scores >= 0 the order of the bit
patterns is the order of the values, so no range has to be known beforehand, bins are equally fine
relative to the score (1 part in 2048 to 4096) at every magnitude, and histograms of any parts of
the data can be added. All counts are integers: the sum is the same in every order, to the last bit.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kdad_dist.errors import KdadError
from kdad_dist.metrics.curves import Counts

Integers = NDArray[np.int64]

_DROPPED_BITS = 12  # of 32; the sign bit is among the 20 that stay, but always 0
_INFINITY = 0x7F800000  # bit pattern; larger ones are NaN or have the sign bit set
BINS = _INFINITY >> _DROPPED_BITS
ONE_REGION = 2**40
"""The weight of a ground-truth region, shared out evenly among its pixels: fixed point, so that
sums are exact. int64 holds 8 million regions of it; rounding is below n / 2**41 for n pixels."""
_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class ScoreHistogram:
    """Counts of pixel scores inside and outside the ground-truth masks.

    Memory does not depend on the number of images: at most 3 arrays of 522240 integers (12.5 MB),
    of which the system hands out only the pages that scores fall into.
    """

    def __init__(self) -> None:
        self.normal: Integers = np.zeros(BINS, np.int64)
        self.defective: Integers = np.zeros(BINS, np.int64)
        self.overlap: Integers = np.zeros(BINS, np.int64)
        self.regions = 0

    def update(
        self, anomaly_map: NDArray[np.floating], gt_mask: NDArray[np.bool_] | None = None
    ) -> None:
        """Counts the pixels of one image (h, w) or of several (b, h, w).

        Args:
            gt_mask: of the same shape, True where defective. None: every pixel is normal.

        Raises:
            KdadError: a score is negative or not finite. Nothing was counted then.
        """
        keys = _keys(anomaly_map)
        if gt_mask is None or not gt_mask.any():
            np.add.at(self.normal, keys.ravel(), 1)
            return
        assert gt_mask.shape == anomaly_map.shape, (gt_mask.shape, anomaly_map.shape)
        np.add.at(self.normal, keys[~gt_mask], 1)
        np.add.at(self.defective, keys[gt_mask], 1)
        for image_keys, mask in zip(_images(keys), _images(gt_mask), strict=True):
            weights, regions = _region_weights(mask)
            np.add.at(self.overlap, image_keys[mask], weights)
            self.regions += regions

    def merge(self, other: "ScoreHistogram") -> None:
        """Adds the counts of another one. Exact: order and grouping make no difference."""
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            used = np.flatnonzero(theirs)
            mine[used] += theirs[used]
        self.regions += other.regions

    def counts(self) -> Counts:
        """The bins that hold a pixel, from the lowest score to the highest."""
        used = np.flatnonzero(self.normal + self.defective)
        return Counts(self.normal[used], self.defective[used], self.overlap[used])

    def pack(self) -> dict[str, Any]:
        """What there is to store: the bins that are not empty, and the number of regions."""
        used = np.flatnonzero(self.normal + self.defective)
        counts = np.stack([array[used] for array in self._arrays()])
        return {"keys": used, "counts": counts, "regions": np.array(self.regions)}

    @classmethod
    def unpack(cls, keys: Integers, counts: Integers, regions: Integers) -> "ScoreHistogram":
        """The histogram that `pack` described."""
        histogram = cls()
        for array, packed in zip(histogram._arrays(), counts, strict=True):
            array[keys] = packed
        histogram.regions = int(regions)
        return histogram

    def _arrays(self) -> tuple[Integers, Integers, Integers]:
        return self.normal, self.defective, self.overlap


def _keys(anomaly_map: NDArray[np.floating]) -> NDArray[np.uint32]:
    """The bin of each score."""
    scores = np.ascontiguousarray(anomaly_map, np.float32)
    bits = scores.view(np.uint32)
    if bits.max(initial=0) >= _INFINITY:
        bits = (scores + np.float32(0)).view(np.uint32)  # -0.0, a sound score, becomes 0.0
    if bits.max(initial=0) >= _INFINITY:
        wrong = scores[(bits >= _INFINITY).reshape(scores.shape)]
        raise KdadError(
            f"{wrong.size} of {scores.size} pixel scores are negative or not finite, "
            f"the first of them {wrong[0]}",
            "pixel scores must be finite and >= 0, larger where more anomalous: "
            "mend the method's anomaly map, or score a checkpoint whose weights are finite",
        )
    return bits >> np.uint32(_DROPPED_BITS)


def _images(array: NDArray) -> NDArray:
    """As (b, h, w), also where there is one image only."""
    return array if array.ndim == 3 else array[None]


def _region_weights(mask: NDArray[np.bool_]) -> tuple[Integers, int]:
    """The weight of each masked pixel in the order of `keys[mask]`, and the number of regions."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return np.zeros(0, np.int64), 0
    # Labelling the box around all regions is several times faster than labelling the image.
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labelled = np.empty(box.shape, np.int32)
    ndimage.label(box, _EIGHT_CONNECTED, output=labelled)  # 1, 2, ... and 0 outside
    labels = labelled[box]
    share = np.rint(ONE_REGION / np.maximum(np.bincount(labels), 1)).astype(np.int64)
    return share[labels], int(labels.max())
