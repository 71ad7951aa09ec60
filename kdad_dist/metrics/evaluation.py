"""Everything that is measured of a scored test set, as one state that processes can merge.

Each process feeds the images that it scored; the states are merged once, for the report. All sums
are integers and all lists are sorted, so that the report does not depend on how the images were
dealt out, nor on the order of merging. What cannot be computed is None, with the reason in `notes`.
"""

import io
import json
import math
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdad_dist.errors import DataError, KdadError
from kdad_dist.metrics.histogram import ScoreHistogram
from kdad_dist.metrics.image import rates
from kdad_dist.metrics.tally import METRICS, Contrast, Tally


class Group(NamedTuple):
    """Images that are tallied together: the good ones of a category, or one kind of defect."""

    category: str
    gt_label: int
    defect_type: str | None


class Evaluation:
    """Scores, histograms and counts of a test set, or of one process's part of it."""

    def __init__(self) -> None:
        self._tallies: dict[Group, Tally] = {}

    def update(
        self,
        key: str,
        category: str,
        defect_type: str | None,
        gt_label: int,
        pred_score: float,
        anomaly_map: NDArray[np.floating] | None = None,
        gt_mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Adds one image.

        Args:
            key: no two images may have the same.
            anomaly_map: (h, w), >= 0. None: the method gives none.
            gt_mask: (h, w), True where defective. None: not known, if the image is defective.

        Raises:
            KdadError: a score is not finite, a pixel score is negative, or a good image has a
                mask that is not empty. The message names the key.
        """
        if not math.isfinite(pred_score):
            raise KdadError(
                f"The score of image {key} is {pred_score}",
                "score a checkpoint whose weights are finite",
            )
        if gt_label == 0 and gt_mask is not None and gt_mask.any():
            raise DataError(
                f"Image {key} is labelled good, but its mask marks {int(gt_mask.sum())} pixels",
                "correct the label or the mask, and pack the data set again",
            )
        group = Group(category, gt_label, defect_type if gt_label else None)
        tally = self._tallies.setdefault(group, Tally())
        assert key not in tally.scores, f"evaluated twice: {key}"
        if anomaly_map is None:
            tally.without_map += 1
        elif gt_label and gt_mask is None:
            tally.without_mask += 1
        else:
            try:
                tally.pixels.update(anomaly_map, gt_mask)
            except KdadError as error:
                raise KdadError(f"Image {key}: {error.problem}", error.remedy) from None
        tally.scores[key] = float(pred_score)

    def merge(self, other: "Evaluation") -> None:
        """Adds the images of another one; no image may be in both."""
        for group, tally in other._tallies.items():
            self._tallies.setdefault(group, Tally()).merge(tally)

    def categories(self) -> list[str]:
        return sorted({group.category for group in self._tallies})

    def labels_and_scores(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of every image of every category, sorted."""
        everything = Contrast()
        for group, tally in self._tallies.items():
            side = everything.defective if group.gt_label else everything.good
            side.scores |= tally.scores
        return everything.labels_and_scores()

    def report(self, threshold: float | None = None) -> dict[str, Any]:
        """`{"mean": ..., "categories": ...}` of metrics.json.

        A mean leaves out the categories whose figure is None. With a threshold on image scores,
        each category also has the `false_positive_rate` and `true_positive_rate` that it gives.
        """
        categories = {name: self._report_category(name, threshold) for name in self.categories()}
        known = {
            metric: [c[metric] for c in categories.values() if c[metric] is not None]
            for metric in METRICS
        }
        mean = {metric: fmean(values) if values else None for metric, values in known.items()}
        return {"mean": mean, "categories": categories}

    def curves(self, points: int = 200) -> dict[str, Any]:
        """For each category its ROC, pixel ROC and PRO curve, without those that do not exist."""
        return {name: self._contrast(name).curves(points) for name in self.categories()}

    def _report_category(self, name: str, threshold: float | None) -> dict[str, Any]:
        contrast = self._contrast(name)
        figures, notes = contrast.figures()
        labels, scores = contrast.labels_and_scores()
        entry: dict[str, Any] = {**figures, "images": len(labels)}
        if threshold is not None:
            entry |= rates(labels, scores, threshold)
        groups = {group for group in self._tallies if group.category == name}
        kinds = sorted(group.defect_type for group in groups if group.defect_type is not None)
        entry["defect_types"] = {kind: self._report_kind(name, kind) for kind in kinds}
        return {**entry, "notes": notes}

    def _report_kind(self, category: str, kind: str) -> dict[str, Any]:
        contrast = self._contrast(category, kind)
        figures, notes = contrast.figures()
        return {**figures, "images": len(contrast.defective.scores), "notes": notes}

    def _contrast(self, category: str, kind: str | None = None) -> Contrast:
        """All good images of a category against all defective ones, or those of one kind."""
        contrast = Contrast()
        for group, tally in self._tallies.items():
            if group.category != category:
                continue
            if group.gt_label == 0:
                contrast.good.merge(tally)
            elif kind in (None, group.defect_type):
                contrast.defective.merge(tally)
        return contrast

    def pack(self) -> bytes:
        """What there is to store, for `unpack`: an .npz file without pickle."""
        arrays: dict[str, Any] = {}
        header = []
        for i, (group, tally) in enumerate(self._tallies.items()):
            header.append(
                {
                    "group": group._asdict(),
                    "scores": tally.scores,
                    "without_map": tally.without_map,
                    "without_mask": tally.without_mask,
                }
            )
            arrays |= {f"{i}.{name}": array for name, array in tally.pixels.pack().items()}
        text = json.dumps(header)
        arrays["header"] = np.frombuffer(text.encode(), np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def unpack(cls, content: bytes) -> "Evaluation":
        """What `pack` described; the content is sound, for its hash was compared."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return cls._restore(stored)

    @classmethod
    def _restore(cls, stored: Any) -> "Evaluation":
        header = json.loads(stored["header"].tobytes())
        evaluation = cls()
        for i, entry in enumerate(header):
            evaluation._tallies[Group(**entry["group"])] = Tally(
                entry["scores"],
                ScoreHistogram.unpack(
                    stored[f"{i}.keys"], stored[f"{i}.counts"], stored[f"{i}.regions"]
                ),
                entry["without_map"],
                entry["without_mask"],
            )
        return evaluation
