"""What each way of turning maps into scores is worth: on synthetic defects, and on the test set.

`read_outs` tries every smoothing, standardisation and reduction on the maps that a method's script
(`stfpm_choices.py`, `loramae_choices.py`) gives it. A candidate's figure on held-out normal images
against themselves with synthetic defects is the one by which it may be chosen; its test figures
stand beside it, and may not decide.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from kdad_dist.config.run import RunConfig, ScoreConfig
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.pixels import to_float
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.synthetic import synthetic_defect
from kdad_dist.methods.readout import Moments, Standard, reduce, smooth
from kdad_dist.metrics.evaluation import Evaluation

CPU = torch.device("cpu")
UNIT = 16
VAL, SYNTHETIC, TEST = "val", "synthetic", "test"
REDUCTIONS = {
    "max": ScoreConfig(reduce="max"),
    "top 100": ScoreConfig(reduce="topk", topk=100),
    "top 1000": ScoreConfig(reduce="topk", topk=1000),
    "quantile 0.995": ScoreConfig(reduce="quantile", quantile=0.995),
    "mean": ScoreConfig(reduce="mean"),
}
Maps = dict[str, Tensor]
"""Anomaly maps (n, s, s) of each group of images."""


@dataclass(frozen=True)
class Images:
    """Images of one kind with their ground truth."""

    samples: list[Sample]
    pixels: NDArray[np.uint8]
    masks: NDArray[np.bool_]

    def apply(self, function: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """The function's tensors of all images, which it is given in small batches."""
        parts = []
        for start in range(0, len(self.pixels), UNIT):
            pixels = torch.from_numpy(self.pixels[start : start + UNIT]).permute(0, 3, 1, 2)
            parts.append(function(to_float(pixels, CPU)))
        return [torch.cat(values) for values in zip(*parts, strict=True)]


def read_groups(config: RunConfig) -> dict[str, Images]:
    """Held-out normal images, the same with synthetic defects, and the test set."""
    data = config.data
    index = Index.read(data.shards)
    reader = ShardReader(data.shards, data.image_size, data.centre_margin)
    select = (data.category, data.normal_class, data.val_fraction)
    val, test = index.select(Split.VAL, *select), index.select(Split.TEST, *select)

    def read(samples: list[Sample], seed: int | None) -> Images:
        images, masks = [], []
        for sample in samples:
            image, mask = reader.image(sample), reader.mask(sample)
            if seed is not None:
                image, mask = synthetic_defect(image, sample.key, seed)
            images.append(image)
            masks.append(mask)
        return Images(samples, np.stack(images), np.stack(masks))

    return {VAL: read(val, None), SYNTHETIC: read(val, config.seed), TEST: read(test, None)}


def read_outs(
    groups: dict[str, Images], raw: Maps, sigmas: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """A row of figures for every way of reading these maps."""
    for sigma, standardise in itertools.product(sigmas, [False, True]):
        maps = {name: smooth(values, sigma) for name, values in raw.items()}
        if standardise:
            maps = standardised(maps)
        pixels = {
            SYNTHETIC: pixel_figures(*((groups[n], maps[n]) for n in (VAL, SYNTHETIC))),
            TEST: pixel_figures((groups[TEST], maps[TEST])),
        }
        for name, config in REDUCTIONS.items():
            scores = {kind: reduce(values, config).numpy() for kind, values in maps.items()}
            labels = np.array([sample.gt_label for sample in groups[TEST].samples])
            good, defective = scores[TEST][labels == 0], scores[TEST][labels == 1]
            yield {
                "reading": {
                    "sigma": f"{sigma:g}",
                    "standardise": "yes" if standardise else "no",
                    "score": name,
                },
                SYNTHETIC: {"image_auroc": auroc(scores[VAL], scores[SYNTHETIC])}
                | pixels[SYNTHETIC],
                TEST: {
                    "image_auroc": auroc(good, defective),
                    **pixels[TEST],
                    "defect_types": by_type(groups[TEST], scores[TEST]),
                },
            }


def standardised(maps: Maps) -> Maps:
    """As scoring does: held-out images by the half that they are not in, test images by all."""
    normal = maps[VAL]
    halves = [Standard.of([Moments.of(normal[1 - fold :: 2])]) for fold in (0, 1)]
    result = {TEST: Standard.of([Moments.of(normal)])(maps[TEST])}
    for name in (VAL, SYNTHETIC):
        result[name] = torch.empty_like(maps[name])
        for fold, half in enumerate(halves):
            result[name][fold::2] = half(maps[name][fold::2])
    return result


def auroc(good: NDArray, defective: NDArray) -> float:
    labels = np.r_[np.zeros(len(good)), np.ones(len(defective))]
    return float(roc_auc_score(labels, np.r_[good, defective]))


def by_type(images: Images, scores: NDArray) -> dict[str, float]:
    kinds = np.array([sample.defect_type or "" for sample in images.samples])
    return {
        str(kind): auroc(scores[kinds == ""], scores[kinds == kind])
        for kind in sorted(set(kinds) - {""})
    }


def pixel_figures(*parts: tuple[Images, Tensor]) -> dict[str, float]:
    evaluation = Evaluation()
    for number, (images, maps) in enumerate(parts):
        for sample, values, mask in zip(images.samples, maps.numpy(), images.masks, strict=True):
            label = int(mask.any())
            kind = "defect" if label else None
            evaluation.update(f"{number}/{sample.key}", "all", kind, label, 0.0, values, mask)
    mean = evaluation.report()["mean"]
    return {"pixel_auroc": mean["pixel_auroc"], "pixel_aupro": mean["pixel_aupro"]}
