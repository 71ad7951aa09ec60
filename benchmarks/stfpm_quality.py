"""How good STFPM gets here and in anomalib: the same images, weights, epochs, and several seeds.

    python benchmarks/stfpm_quality.py CATEGORY_FOLDER WEIGHTS.safetensors --work FOLDER

ResNet-18, layers 1 to 3, 256 px, batch 32; nothing is held out, and the last step is scored. Both
are measured by our metrics on our masks, anomalib by the maps that its network gives (its own
figures are taken after a post-processing, and printed beside). Ours trains in bfloat16 with cached
teacher features, in two ways:

* ours-official: learning rate 0.4 and weight decay 1e-4, as the authors have it;
* ours-equal: the steps that anomalib takes. Its loss is half the sum over the batch and ours the
  mean, so that its learning rate of 0.4 is 0.4 * 32 / 2 = 6.4 here, its weight decay 1e-3 / 16;
* ours-summed: the same, and a short batch counts by its share of a whole one, as in a sum.

What FOLDER holds already is not trained again, so that an interrupted comparison goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from peers import peer_python, versions
from stfpm import subset

from kdad_dist.data.index import Index, Split
from kdad_dist.data.reader import ShardReader
from kdad_dist.metrics.evaluation import Evaluation

HERE = Path(__file__).resolve().parent
SIZE, BATCH = 256, 32
SCALE = BATCH / 2
"""anomalib's loss of a batch in units of ours."""
EQUAL = [f"optim.lr={0.4 * SCALE}", f"optim.weight_decay={1e-3 / SCALE}"]
OURS = {"ours-official": [], "ours-equal": EQUAL, "ours-summed": EQUAL}
PEER, PEER_ITSELF = "anomalib", "anomalib by its own metrics"
FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_aupro": "AUPRO"}
Figures = dict[str, float]


class Comparison:
    """Trains and measures in a folder, going on where it was left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work.resolve()
        self.shards, self.config = self.work / "shards", self.work / "config.yaml"

    def prepare(self) -> None:
        category, count = self.options.category.resolve(), self.options.train_images
        links = self.work / "images" / category.name
        if not links.is_dir():
            subset(category, links, count, sys.maxsize)
        self.kdad("pack", links, self.shards, "--size", SIZE)
        teacher = {"backbone": "resnet18", "weights": str(self.options.weights.resolve())}
        text = {
            "name": "quality",
            "data": {"shards": str(self.shards), "image_size": SIZE, "val_fraction": 0},
            "method": {"name": "stfpm", "teacher": teacher, "cache_teacher": True},
            "optim": {"name": "sgd", "lr": 0.4, "weight_decay": 1e-4},
            "train": {
                "epochs": self.options.epochs,
                "batch_size": BATCH,
                "precision": "bf16",
            },
            "score": {"smooth_sigma": 0, "checkpoint": "last"},
        }
        self.config.write_text(yaml.safe_dump(text))

    def kdad(self, *words: object, program: Sequence[object] = ("-m", "kdad_dist")) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.options.threads),
            "KDAD_CACHE": str(self.work / "cache"),
            "PYTHONPATH": str(HERE.parent),
        }
        command = [sys.executable, *map(str, (*program, *words))]
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)

    def ours(self, name: str, seed: int) -> Figures:
        run = self.work / f"{name}-s{seed}"
        if not (run / "metrics-last.json").is_file():
            words = ["train", self.config, f"output={run}", f"seed={seed}", *OURS[name]]
            if name == "ours-summed":
                self.kdad(*words, program=[HERE / "stfpm_summed.py", BATCH])
            else:
                self.kdad(*words)
            self.kdad("score", run)
        return json.loads((run / "metrics-last.json").read_text())["mean"]

    def peer(self, seed: int) -> tuple[Figures, Figures]:
        """anomalib's figures, by our metrics and by its own."""
        folder = self.work / f"peer-s{seed}"
        result = folder / "result.json"
        if not result.is_file():
            options = self.options
            words = [peer_python(), HERE / "peer_stfpm.py", options.category, options.weights]
            words += ["--epochs", options.epochs, "--train-images", options.train_images]
            words += ["--image-size", SIZE, "--batch-size", BATCH, "--threads", options.threads]
            words += ["--seed", seed, "--keep", folder]
            done = subprocess.run(
                [str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True
            )
            result.write_text(done.stdout.splitlines()[-1])
        return self.measured(folder), json.loads(result.read_text())

    def measured(self, folder: Path) -> Figures:
        """Raw maps of the test images, measured as ours are; the score is the largest pixel."""
        names = json.loads((folder / "names.json").read_text())
        rows = {name.rpartition(".")[0]: row for row, name in enumerate(names)}
        maps = np.load(folder / "maps.npy", mmap_mode="r")
        reader, evaluation = ShardReader(str(self.shards), SIZE), Evaluation()
        samples = Index.read(str(self.shards)).select(Split.TEST, "all", None, 0.0)
        assert len(samples) == len(names)
        for sample in samples:
            values = np.array(maps[rows["/".join(sample.key.split("/")[-2:])]])
            about = (sample.key, sample.category, sample.defect_type, sample.gt_label or 0)
            evaluation.update(*about, float(values.max()), values, reader.mask(sample))
        return evaluation.report()["mean"]

    def results(self) -> dict[str, list[Figures]]:
        """The figures of every way, one for each seed."""
        found: dict[str, list[Figures]] = {name: [] for name in (PEER, PEER_ITSELF, *OURS)}
        for seed in self.options.seeds:
            measured, itself = self.peer(seed)
            found[PEER].append(measured)
            found[PEER_ITSELF].append(itself)
            for name in OURS:
                found[name].append(self.ours(name, seed))
        return found


def lines(found: dict[str, list[Figures]]) -> Iterator[str]:
    """Markdown: mean and deviation, and how many deviations ours lies above anomalib."""
    yield "| | " + " | ".join(FIGURES.values()) + " |"
    yield "| --- | --- | --- | --- |"
    for name, rows in found.items():
        cells = [cell([row[key] for row in rows]) for key in FIGURES]
        yield f"| {name} | " + " | ".join(cells) + " |"
    for name in OURS:
        cells = [
            difference([row[key] for row in found[name]], [row[key] for row in found[PEER]])
            for key in FIGURES
        ]
        yield f"| {name} minus {PEER} | " + " | ".join(cells) + " |"


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def difference(ours: list[float], peer: list[float]) -> str:
    """Of the means, and in deviations of a single run (of both: the root of the mean square)."""
    by = mean(ours) - mean(peer)
    if len(ours) < 2:
        return f"{by:+.3f}"
    deviation = ((stdev(ours) ** 2 + stdev(peer) ** 2) / 2) ** 0.5
    return f"{by:+.3f} ({by / deviation:+.1f} deviations)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("category", type=Path, help="in the layout of MVTec AD")
    parser.add_argument("weights", type=Path, help="ImageNet ResNet-18, stem to layer3, timm names")
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=300, help="the first ones by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    comparison = Comparison(options)
    comparison.work.mkdir(parents=True, exist_ok=True)
    comparison.prepare()
    found: dict[str, Any] = comparison.results()
    print(f"{options.epochs} epochs, seeds {options.seeds}; {versions(peer_python())}")
    for line in lines(found):
        print(line)


if __name__ == "__main__":
    main()
