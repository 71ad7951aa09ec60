"""STFPM end to end against anomalib's, on the same images, threads and number of epochs.

    python benchmarks/stfpm.py CATEGORY_FOLDER WEIGHTS.safetensors [--epochs 2] [--train-images 128]

ResNet-18, layers 1 to 3, 256 px, batch 32. Training is read off the steady state (start-up,
decoding and the first steps left out on both sides), scoring includes metrics and reading files.
anomalib runs in an environment of its own, which is made on the first call (`benchmarks/peers.py`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from peers import peer_python, versions

HERE = Path(__file__).resolve().parent


def subset(source: Path, target: Path, train: int, per_kind: int) -> Path:
    """A category of links to the first images of each folder."""
    for folder in sorted(path for path in source.rglob("*") if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        limit = train if "train" in folder.parts else per_kind
        for file in files[:limit]:
            link = target / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    return target


def ours(category: Path, weights: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of kdad_dist: float32 and bfloat16, and with the teacher's features cached."""
    shards, config = work / "shards", work / "config.yaml"
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "KDAD_CACHE": str(work / "cache"),
        "PYTHONPATH": str(HERE.parent),
    }

    def kdad(*words: object) -> None:
        command = [sys.executable, "-m", "kdad_dist", *map(str, words)]
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)

    kdad("pack", category, shards)
    text = {
        "name": "benchmark",
        "data": {"shards": str(shards)},
        "method": {"teacher": {"backbone": "resnet18", "weights": str(weights.resolve())}},
        "optim": {"name": "sgd", "lr": 0.4, "weight_decay": 1e-4},
        "train": {"epochs": options.epochs, "batch_size": 32, "log_every": 1},
        "score": {"smooth_sigma": 0, "checkpoint": "last"},
    }
    config.write_text(yaml.safe_dump(text))
    variants = {
        "float32": [],
        "bf16": ["train.precision=bf16"],
        "bf16, cached teacher": ["train.precision=bf16", "method.cache_teacher=true"],
    }
    figures = {}
    for name, overrides in variants.items():
        run = work / name.replace(", ", "-").replace(" ", "-")
        kdad("train", config, f"output={run}", *overrides)
        precision = "bf16" if "bf16" in name else "no"
        kdad("score", run, f"score.precision={precision}")
        metrics = json.loads((run / "metrics-last.json").read_text())
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        pace = [line["images_per_second"] for line in lines if "images_per_second" in line]
        figures[name] = {
            "train_images_per_second": median(pace[2:]),
            "test_images_per_second": metrics["provenance"]["images_per_second"],
            "image_auroc": metrics["mean"]["image_auroc"],
            "pixel_auroc": metrics["mean"]["pixel_auroc"],
        }
    return figures


def anomalib(category: Path, weights: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [peer_python(), HERE / "peer_stfpm.py", category, weights]
    command += ["--epochs", options.epochs, "--threads", options.threads, "--workers", 0]
    done = subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("category", type=Path, help="in the layout of MVTec AD")
    parser.add_argument("weights", type=Path, help="ImageNet ResNet-18, stem to layer3, timm names")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=16, help="of each kind")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        name = options.category.name
        category = subset(options.category, work / name, options.train_images, options.test_images)
        peer = anomalib(category, options.weights, options)
        figures = ours(category, options.weights, work, options)
    print(f"{options.threads} threads, {options.epochs} epochs; {versions(peer_python())}")
    print(f"{'':24} {'train img/s':>12} {'test img/s':>12} {'image AUROC':>12} {'pixel AUROC':>12}")
    for name, row in {"anomalib": peer, **{f"ours, {k}": v for k, v in figures.items()}}.items():
        train, test = row["train_images_per_second"], row["test_images_per_second"]
        print(
            f"{name:24} {train:12.1f} {test:12.1f} "
            f"{row['image_auroc']:12.3f} {row['pixel_auroc']:12.3f}   "
            f"{train / peer['train_images_per_second']:5.2f}x training, "
            f"{test / peer['test_images_per_second']:5.2f}x scoring"
        )


if __name__ == "__main__":
    main()
