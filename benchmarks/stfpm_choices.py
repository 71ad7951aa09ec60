"""What each way of reading an STFPM run is worth: on synthetic defects, and on the test set.

For every candidate (layers, how their maps are combined, smoothing, standardisation, reduction to a
score) this writes the AUROC of held-out normal images against themselves with synthetic defects, by
which one may choose, and beside it the test figures, by which one may not.

    python benchmarks/stfpm_choices.py RUN... --out choices.json
    python benchmarks/results_tables.py --choices choices.json
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from kdad_dist.config import ScoreConfig, load_run
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.loader import to_float
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.synthetic import synthetic_defect
from kdad_dist.methods.readout import Moments, Standard, reduce, smooth
from kdad_dist.methods.stfpm import Stfpm, combine
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.runtime.restore import restore

CPU = torch.device("cpu")
UNIT = 16
SIGMAS = (0.0, 4.0)
REDUCTIONS = {
    "max": ScoreConfig(reduce="max"),
    "top 100": ScoreConfig(reduce="topk", topk=100),
    "top 1000": ScoreConfig(reduce="topk", topk=1000),
    "quantile 0.995": ScoreConfig(reduce="quantile", quantile=0.995),
    "mean": ScoreConfig(reduce="mean"),
}


@dataclass
class Group:
    """Images of one kind: distance maps by layer at their own size, and the ground truth."""

    samples: list[Sample]
    layers: list[Tensor]
    masks: np.ndarray


@torch.no_grad()
def measure(method: Stfpm, reader: ShardReader, samples: list[Sample], seed: int | None) -> Group:
    """Distance maps of the samples; with a seed, of the samples with synthetic defects."""
    maps: list[list[Tensor]] = []
    masks = []
    for start in range(0, len(samples), UNIT):
        images = []
        for sample in samples[start : start + UNIT]:
            image, mask = reader.image(sample), reader.mask(sample)
            if seed is not None:
                image, mask = synthetic_defect(image, sample.key, seed)
            images.append(image)
            masks.append(mask)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        maps.append(method.distances(to_float(pixels, CPU)))
    return Group(samples, [torch.cat(layer) for layer in zip(*maps, strict=True)], np.stack(masks))


def candidates(count: int) -> Iterator[tuple[tuple[int, ...], str, float, bool]]:
    """Layers, combination, smoothing, standardisation."""
    for size in range(1, count + 1):
        for layers in itertools.combinations(range(count), size):
            ways = ["product", "sum"] if size > 1 else ["product"]
            yield from itertools.product([layers], ways, SIGMAS, [False, True])


def evaluate(groups: dict[str, Group], size: int) -> Iterator[dict]:
    val, synthetic, test = groups["val"], groups["synthetic"], groups["test"]
    for layers, way, sigma, standardise in candidates(len(val.layers)):
        maps = {
            name: smooth(combine([group.layers[i] for i in layers], way, size, size), sigma)
            for name, group in groups.items()
        }
        if standardise:
            maps = standardised(maps)
        pixels = {
            "synthetic": pixel_figures((val, maps["val"]), (synthetic, maps["synthetic"])),
            "test": pixel_figures((test, maps["test"])),
        }
        for name, config in REDUCTIONS.items():
            scores = {kind: reduce(values, config).numpy() for kind, values in maps.items()}
            yield {
                "layers": [i + 1 for i in layers],
                "combine": way,
                "sigma": sigma,
                "standardise": standardise,
                "reduce": name,
                "synthetic": {
                    "image_auroc": auroc(scores["val"], scores["synthetic"]),
                    **pixels["synthetic"],
                },
                "test": {
                    "image_auroc": image_auroc(test, scores["test"]),
                    **pixels["test"],
                    "defect_types": by_type(test, scores["test"]),
                },
            }


def standardised(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """As scoring does: held-out images by the half that they are not in, test images by all."""
    normal = maps["val"]
    halves = [Standard.of([Moments.of(normal[1 - fold :: 2])]) for fold in (0, 1)]
    result = {"test": Standard.of([Moments.of(normal)])(maps["test"])}
    for name in ("val", "synthetic"):
        result[name] = torch.empty_like(maps[name])
        for fold, half in enumerate(halves):
            result[name][fold::2] = half(maps[name][fold::2])
    return result


def auroc(good: np.ndarray, defective: np.ndarray) -> float:
    labels = np.r_[np.zeros(len(good)), np.ones(len(defective))]
    return float(roc_auc_score(labels, np.r_[good, defective]))


def image_auroc(group: Group, scores: np.ndarray) -> float:
    labels = np.array([sample.gt_label for sample in group.samples])
    return auroc(scores[labels == 0], scores[labels == 1])


def by_type(group: Group, scores: np.ndarray) -> dict[str, float]:
    kinds = np.array([sample.defect_type or "" for sample in group.samples])
    return {
        str(kind): auroc(scores[kinds == ""], scores[kinds == kind])
        for kind in sorted(set(kinds) - {""})
    }


def pixel_figures(*parts: tuple[Group, Tensor]) -> dict[str, float]:
    evaluation = Evaluation()
    for number, (group, maps) in enumerate(parts):
        for sample, values, mask in zip(group.samples, maps.numpy(), group.masks, strict=True):
            label = int(mask.any())
            kind = "defect" if label else None
            evaluation.update(f"{number}/{sample.key}", "all", kind, label, 0.0, values, mask)
    mean = evaluation.report()["mean"]
    return {"pixel_auroc": mean["pixel_auroc"], "pixel_aupro": mean["pixel_aupro"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", help="where the shards are now")
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        config = load_run(run, [f"data.shards={options.shards}"] if options.shards else [])
        data = config.data
        index = Index.read(data.shards)
        trained = restore(config)
        assert isinstance(trained.method, Stfpm)
        reader = ShardReader(data.shards, data.image_size)
        select = (data.category, data.normal_class, data.val_fraction)
        val, test = index.select(Split.VAL, *select), index.select(Split.TEST, *select)
        groups = {
            "val": measure(trained.method, reader, val, None),
            "synthetic": measure(trained.method, reader, val, config.seed),
            "test": measure(trained.method, reader, test, None),
        }
        for row in evaluate(groups, data.image_size):
            rows.append({"run": str(run), "step": trained.step, "seed": config.seed, **row})
    options.out.write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} candidates in {options.out}")


if __name__ == "__main__":
    main()
