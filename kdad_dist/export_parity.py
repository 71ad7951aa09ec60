"""Whether an exported file says what the run says, on the images that the run was measured on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdad_dist.config import RunConfig
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.reader import ShardReader
from kdad_dist.detector import Detector, judge
from kdad_dist.errors import DataError, ExportError
from kdad_dist.export_made import OUTPUTS, Outputs, Runner
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.runtime.progress import progress

TOLERANCE = 1e-4
"""Largest difference of a score or of a pixel of a map, as a share of the largest one that the run
gives. Another order of summation in float32 was seen to make 1e-6 of it."""
GENERATED = 16
"""Images that are made up where the run's test images are not at hand."""
FIGURES = ("image_auroc", "pixel_auroc")


class Picture(NamedTuple):
    pixels: NDArray[np.uint8]
    """(s, s, 3), as a graph takes it: of `data.read_size`."""
    sample: Sample | None
    """None: it was made up."""
    mask: NDArray[np.bool_] | None
    """Of what is judged of it."""


@dataclass
class Difference:
    """Of one output, over all images."""

    largest: float = 0.0
    of: float = 0.0
    """The largest value that the run gives."""

    def add(self, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
        if ours.shape != theirs.shape:
            raise ExportError(
                f"the run gives {ours.shape}, the file {theirs.shape}", "report this as a fault"
            )
        found = np.abs(ours.astype(np.float64) - theirs).max()
        self.largest = float(np.maximum(self.largest, found))  # which keeps what is no number
        self.of = max(self.of, float(np.abs(ours).max()))

    @property
    def small(self) -> bool:
        return self.largest <= TOLERANCE * self.of


@dataclass
class Comparison:
    """What the run and the file say of the same images."""

    differences: dict[str, Difference] = field(default_factory=dict)
    ours: Evaluation = field(default_factory=Evaluation)
    theirs: Evaluation = field(default_factory=Evaluation)

    def add(self, pictures: list[Picture], ours: Outputs, theirs: Outputs) -> None:
        if ours.keys() != theirs.keys():
            raise ExportError(
                f"the run gives {', '.join(ours)}, the file {', '.join(theirs)}",
                "report this as a fault",
            )
        for name, values in ours.items():
            self.differences.setdefault(name, Difference()).add(values, theirs[name])
        for said, evaluation in ((ours, self.ours), (theirs, self.theirs)):
            maps = said.get("anomaly_map", [None] * len(pictures))
            for picture, score, anomaly_map in zip(pictures, said["pred_score"], maps, strict=True):
                if (sample := picture.sample) is not None:
                    assert sample.gt_label is not None
                    where = (sample.key, sample.category, sample.defect_type, sample.gt_label)
                    evaluation.update(*where, float(score), anomaly_map, picture.mask)

    def figures(self) -> dict[str, dict[str, float | None]]:
        """The AUROCs of both, means over categories as in `metrics.json`."""
        ours, theirs = (e.report()["mean"] for e in (self.ours, self.theirs))
        return {name: {"run": ours[name], "exported": theirs[name]} for name in FIGURES}


def compare(detector: Detector, run: Runner, most: int) -> dict[str, Any]:
    """How far the file is from the run, for the manifest.

    Args:
        most: test images, spread evenly over the test split; 0: all.

    Raises:
        ExportError: farther than `TOLERANCE`.
        DataError: a test image is damaged.
    """
    config = detector.config
    samples, available, why = test_images(config, most)
    found = Comparison()
    with progress("comparing", len(samples) or GENERATED, "images") as bar:
        for unit in units(detector, samples):
            images = np.stack([picture.pixels for picture in unit])
            judged = judge(detector.readout, list(map(detector.fit.image, images)), detector.device)
            ours = {n: v for n in OUTPUTS if (v := getattr(judged, n)) is not None}
            found.add(unit, ours, run(images))
            bar.advance(len(unit))
    differences = {
        name: {"largest_difference": d.largest, "largest_value": d.of}
        for name, d in found.differences.items()
    }
    for name, difference in found.differences.items():
        if not difference.small:
            raise ExportError(
                f"{name} of the exported graph differs from the run's by up to "
                f"{difference.largest:g}, where the largest is {difference.of:g}; "
                f"{TOLERANCE:g} of it is allowed. Nothing was written",
                "use another --format, or `kdad_dist.load`",
            )
    images = {"images": len(samples) or GENERATED, "test_images": available, "generated": why}
    return {**images, "tolerance": TOLERANCE, **differences, **found.figures()}


def test_images(config: RunConfig, most: int) -> tuple[list[Sample], int, str | None]:
    """Those to compare on, how many there are, and why there is none."""
    data = config.data
    try:
        index = Index.read(data.shards)
        samples = index.select(Split.TEST, data.category, data.normal_class, data.val_fraction)
    except DataError as error:
        return [], 0, error.problem
    if not samples:
        return [], 0, f"{data.shards} holds no test image"
    chosen = np.linspace(0, len(samples) - 1, min(most or len(samples), len(samples)))
    return [samples[i] for i in chosen.round().astype(int)], len(samples), None


def pictures(detector: Detector, samples: list[Sample]) -> Iterator[Picture]:
    """The samples' images, or where there is none, noise."""
    config, fit = detector.config, detector.fit
    size = config.data.read_size
    if not samples:
        noise = np.random.default_rng(config.seed)
        for _ in range(GENERATED):
            yield Picture(noise.integers(0, 256, (size, size, 3), dtype=np.uint8), None, None)
        return
    reader = ShardReader(config.data.shards, size)
    for sample in samples:
        known = sample.mask is not None or sample.gt_label == 0
        mask = fit.mask(reader.mask(sample)) if known else None
        yield Picture(reader.image(sample), sample, mask)


def units(detector: Detector, samples: list[Sample]) -> Iterator[list[Picture]]:
    """Batches of several sizes: one image, then as many as are scored together."""
    left = pictures(detector, samples)
    yield [next(left)]
    while unit := list(islice(left, detector.config.images_per_unit)):
        yield unit
