"""What is kept of a group of scored images, and what good against defective ones come to."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdad_dist.metrics.curves import PRO_LIMIT, aupro, auroc, average_precision, pro, roc
from kdad_dist.metrics.histogram import ScoreHistogram
from kdad_dist.metrics.image import image_metrics, image_roc

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_aupro")
METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)

Figures = dict[str, float | None]


@dataclass
class Tally:
    """Image scores by key, and the histogram of their pixels. Mergeable, in any order."""

    scores: dict[str, float] = field(default_factory=dict)
    pixels: ScoreHistogram = field(default_factory=ScoreHistogram)
    without_map: int = 0
    without_mask: int = 0
    """Defective images without a mask. Their pixels are not counted."""

    def merge(self, other: "Tally") -> None:
        twice = self.scores.keys() & other.scores.keys()
        assert not twice, f"evaluated twice: {sorted(twice)[:3]}"
        self.scores.update(other.scores)
        self.pixels.merge(other.pixels)
        self.without_map += other.without_map
        self.without_mask += other.without_mask


@dataclass
class Contrast:
    """Good images against defective ones."""

    good: Tally = field(default_factory=Tally)
    defective: Tally = field(default_factory=Tally)

    def labels_and_scores(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of every image, sorted, so that they do not depend on the order of merging."""
        good, defective = sorted(self.good.scores.values()), sorted(self.defective.scores.values())
        return np.repeat([0, 1], [len(good), len(defective)]), np.array(good + defective)

    def figures(self) -> tuple[Figures, dict[str, str]]:
        """The six metrics, and for each that is None the reason.

        The second also says under `masks` how many defective images the pixel metrics leave out.
        """
        figures: Figures = dict.fromkeys(METRICS)
        notes: dict[str, str] = {}
        if reason := self._why_no_image_metrics():
            notes |= dict.fromkeys(IMAGE_METRICS, reason)
        else:
            figures |= image_metrics(*self.labels_and_scores())
        pixels = self._pixels()
        if reason := self._why_no_pixel_metrics(pixels):
            notes |= dict.fromkeys(PIXEL_METRICS, reason)
            return figures, notes
        counts = pixels.counts()
        figures["pixel_auroc"] = auroc(counts)
        figures["pixel_ap"] = average_precision(counts)
        figures["pixel_aupro"] = aupro(counts)
        if missing := self.defective.without_mask:
            images = len(self.defective.scores)
            notes["masks"] = (
                f"{missing} of {images} defective images have no mask: "
                "the pixel metrics leave them out"
            )
        return figures, notes

    def curves(self, points: int) -> dict[str, Any]:
        """ROC of images and of pixels, and PRO up to its limit, without those that do not exist."""
        curves: dict[str, Any] = {}
        if not self._why_no_image_metrics():
            curve = image_roc(*self.labels_and_scores()).thinned(points)
            curves["roc"] = {"fpr": curve.x.tolist(), "tpr": curve.y.tolist()}
        pixels = self._pixels()
        if not self._why_no_pixel_metrics(pixels):
            counts = pixels.counts()
            curve = roc(counts).thinned(points)
            curves["pixel_roc"] = {"fpr": curve.x.tolist(), "tpr": curve.y.tolist()}
            curve = pro(counts).up_to(PRO_LIMIT).thinned(points)
            curves["pro"] = {"fpr": curve.x.tolist(), "pro": curve.y.tolist()}
        return curves

    def _pixels(self) -> ScoreHistogram:
        pixels = ScoreHistogram()
        pixels.merge(self.good.pixels)
        pixels.merge(self.defective.pixels)
        return pixels

    def _why_no_image_metrics(self) -> str:
        if not self.good.scores:
            return "there are no good images"
        return "" if self.defective.scores else "there are no defective images"

    def _why_no_pixel_metrics(self, pixels: ScoreHistogram) -> str:
        defective = self.defective
        if not defective.scores:
            return "there are no defective images"
        if defective.without_map == len(defective.scores):
            return "the method gives no anomaly map"
        if defective.without_mask + defective.without_map == len(defective.scores):
            return "no defective image has a mask"
        if pixels.regions == 0:
            return "the masks are all empty"
        return "" if pixels.normal.any() else "the masks leave no normal pixel"
