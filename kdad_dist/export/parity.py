"""Whether an exported file says what the run says, on the images that the run was measured on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.reader import ShardReader
from kdad_dist.detector import Detector, judge
from kdad_dist.errors import DataError, ExportError
from kdad_dist.export.made import OUTPUTS, Outputs, Runner
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.runtime.progress import progress

TOLERANCE = 1e-4
"""Largest difference of a score, of a logit or of a pixel of a map, as a share of the largest one
that the run gives. Another order of summation in float32 was seen to make 1e-6 of it. Pixels of 8
bits may round otherwise: they differ by 1 at most."""
GENERATED = 16
"""Images that are made up, at most, where the run's test images are not at hand."""
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
    allowed: float = 0.0

    def add(self, ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            one, other = (f"{values.dtype} of shape {values.shape}" for values in (ours, theirs))
            raise ExportError(f"the run gives {one}, the file {other}", "report this as a fault")
        found = np.abs(ours.astype(np.float64) - theirs).max()
        self.largest = float(np.maximum(self.largest, found))  # which keeps what is no number
        self.of = max(self.of, float(np.abs(ours).max()))
        self.allowed = 1.0 if ours.dtype == np.uint8 else TOLERANCE * self.of

    @property
    def small(self) -> bool:
        return self.largest <= self.allowed


class Quality(Protocol):
    """How good what is said of test images is."""

    def add(self, pictures: Sequence[Picture], said: Outputs) -> None: ...

    def figures(self) -> dict[str, float | None]: ...


class Anomalies:
    """AUROCs, means over categories as in `metrics.json`."""

    def __init__(self) -> None:
        self.evaluation = Evaluation()

    def add(self, pictures: Sequence[Picture], said: Outputs) -> None:
        maps = said.get("anomaly_map", [None] * len(pictures))
        for picture, score, anomaly_map in zip(pictures, said["pred_score"], maps, strict=True):
            if (sample := picture.sample) is not None:
                assert sample.gt_label is not None
                where = (sample.key, sample.category, sample.defect_type, sample.gt_label)
                self.evaluation.update(*where, float(score), anomaly_map, picture.mask)

    def figures(self) -> dict[str, float | None]:
        mean = self.evaluation.report()["mean"]
        return {name: mean[name] for name in FIGURES}


class Classes:
    """The share of images whose class is told."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def add(self, pictures: Sequence[Picture], said: Outputs) -> None:
        for picture, label in zip(pictures, said["pred_label"].tolist(), strict=True):
            if picture.sample is not None:
                self.right.append(label == picture.sample.gt_label)

    def figures(self) -> dict[str, float | None]:
        return {"accuracy": sum(self.right) / len(self.right) if self.right else None}


@dataclass
class Comparison:
    """What the run and the file say of the same images."""

    ours: Quality
    theirs: Quality
    differences: dict[str, Difference] = field(default_factory=dict)
    relabelled: int = 0
    """Images whose class is another one: those whose likeliest two differ by less than rounding."""

    def add(self, pictures: list[Picture], ours: Outputs, theirs: Outputs) -> None:
        if ours.keys() != theirs.keys():
            raise ExportError(
                f"the run gives {', '.join(ours)}, the file {', '.join(theirs)}",
                "report this as a fault",
            )
        for name, values in ours.items():
            if name == "pred_label":
                self.relabelled += int((values != theirs[name]).sum())
            else:
                self.differences.setdefault(name, Difference()).add(values, theirs[name])
        self.ours.add(pictures, ours)
        self.theirs.add(pictures, theirs)

    def facts(self) -> dict[str, Any]:
        """What is kept of it."""
        told = {"images_relabelled": self.relabelled} if isinstance(self.ours, Classes) else {}
        theirs = self.theirs.figures()
        return {
            **{
                name: {"largest_difference": found.largest, "largest_value": found.of}
                for name, found in self.differences.items()
            },
            **told,
            **{
                name: {"run": value, "exported": theirs[name]}
                for name, value in self.ours.figures().items()
            },
        }


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
    quality = Classes if config.tells_classes else Anomalies
    found = Comparison(quality(), quality())
    number = len(samples) or min(most or GENERATED, GENERATED)
    with progress("comparing", number, "images") as bar:
        for unit in units(detector, samples, number):
            images = np.stack([picture.pixels for picture in unit])
            found.add(unit, said_by(detector, images), run(images))
            bar.advance(len(unit))
    for name, difference in found.differences.items():
        if not difference.small:
            raise ExportError(
                f"{name} of the exported file differs from the run's by up to "
                f"{difference.largest:g}, where the largest is {difference.of:g}; "
                f"{difference.allowed:g} is allowed. Nothing was written",
                "use another --format, or `kdad_dist.load`",
            )
    images = {"images": number, "test_images": available, "generated": why}
    return {**images, "tolerance": TOLERANCE, **found.facts()}


def said_by(detector: Detector, images: NDArray[np.uint8]) -> Outputs:
    """What a detector says of images of the size at which it reads them."""
    said = judge(detector.readout, list(map(detector.fit.image, images)), detector.device)
    return {name: v for name in OUTPUTS if (v := getattr(said, name)) is not None}


def test_images(config: RunConfig, most: int) -> tuple[list[Sample], int, str | None]:
    """Those to compare on, how many there are, and why there is none."""
    data = config.data
    try:
        index = Index.read(data.shards)
        chosen = (data.category, data.normal_class, data.val_fraction, data.classes)
        samples = index.select(Split.TEST, *chosen)
    except DataError as error:
        return [], 0, error.problem
    if not samples:
        return [], 0, f"{data.shards} holds no test image"
    places = np.linspace(0, len(samples) - 1, min(most or len(samples), len(samples)))
    return [samples[i] for i in places.round().astype(int)], len(samples), None


def pictures(detector: Detector, samples: list[Sample], number: int) -> Iterator[Picture]:
    """The samples' images, or where there is none, so many of noise."""
    config, fit = detector.config, detector.fit
    size = config.data.read_size
    if not samples:
        noise = np.random.default_rng(config.seed)
        for _ in range(number):
            yield Picture(noise.integers(0, 256, (size, size, 3), dtype=np.uint8), None, None)
        return
    reader = ShardReader(config.data.shards, size)
    for sample in samples:
        truth = reader.truth(sample)
        yield Picture(reader.image(sample), sample, None if truth is None else fit.mask(truth))


def units(detector: Detector, samples: list[Sample], number: int) -> Iterator[list[Picture]]:
    """Batches of several sizes: one image, then as many as are scored together."""
    left = pictures(detector, samples, number)
    yield [next(left)]
    while unit := list(islice(left, detector.config.images_per_unit)):
        yield unit
