"""A unit of work of a scoring: some images that go through the network together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdad_dist.config.run import RunConfig
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.sample import Sample
from kdad_dist.data.synthetic import synthetic_defect
from kdad_dist.detector import judge
from kdad_dist.methods.readout import Readout
from kdad_dist.score.explain import Explainer, compared
from kdad_dist.score.parts import SYNTHETIC, TEST, Compared, Scored, ScoredUnit

NEW = -1


class Unit(NamedTuple):
    """Images that go through the network together."""

    kind: str
    samples: Sequence[Sample]
    fold: int = NEW
    """Half of the held-out images that these belong to."""


@dataclass(frozen=True)
class Scorer:
    """Reads, scores and keeps what one process needs to do so."""

    config: RunConfig
    readouts: Sequence[Readout]
    """One, or (`score.standardise`) those for the folds of held-out images and one for new ones."""
    reader: ShardReader
    device: torch.device
    explainer: Explainer | None = None
    """What compares networks on test images, where that was asked for."""

    def __call__(self, unit: Unit) -> ScoredUnit:
        pairs = [self.load(unit.kind, sample) for sample in unit.samples]
        readout = self.readouts[unit.fold if len(self.readouts) > 1 else NEW]
        said = judge(readout, [image for image, _ in pairs], self.device)

        def of(part: NDArray[Any] | None) -> Sequence[NDArray[Any] | None]:
            return [None] * len(pairs) if part is None else list(part)

        masks = [mask for _, mask in pairs]
        labels = [None] * len(pairs) if said.pred_label is None else said.pred_label.tolist()
        agreement = self.agreement(unit, [image for image, _ in pairs])
        parts = (of(said.anomaly_map), of(said.reconstruction), masks, labels, agreement)
        images = [
            Scored(unit.kind, *one)
            for one in zip(unit.samples, said.pred_score.tolist(), *parts, strict=True)
        ]
        return ScoredUnit(images, said.seconds)

    def agreement(self, unit: Unit, images: list[NDArray[np.uint8]]) -> Sequence[Compared | None]:
        """How far networks look at the same in each test image."""
        if self.explainer is None or unit.kind != TEST:
            return [None] * len(images)
        labels = [sample.gt_label or 0 for sample in unit.samples]
        return [compared(seen) for seen in self.explainer(images, labels)]

    def load(self, kind: str, sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Pixels (s, s, 3) and ground truth (s, s), None where it is not known."""
        image = self.reader.image(sample)
        if kind == SYNTHETIC:
            return synthetic_defect(image, sample.key, self.config.seed)
        return image, self.reader.truth(sample)
