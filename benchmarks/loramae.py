"""The masked autoencoder end to end against a plain loop as the original writes it.

    python benchmarks/loramae.py CATEGORY_FOLDER [--preset mae_vit_small_patch7] [--epochs 20]

Same preset, images (turned into PNG files first), batch, augmentation, epochs, threads, optimizer;
nothing is held out. The peer (`peer_mae.py`) decodes PNG files in every epoch with a worker per
thread, computes in float32, and scores one mask at a time; ours is `kdad train` and `kdad score` on
packed shards, the cache cold. Each runs as a process of its own; they take turns, and the best of
several rounds counts. Columns:

* whole: images/s of the whole process, its start and its end included;
* loop: training: images/s once it runs (the peer's last epoch, the median of ours); scoring: from
  the first file to the last map, ours with metrics, the peer without;
* CPU s: CPU seconds per image of the whole process, which other work on the machine disturbs less;
* MiB: peak resident memory of its largest process (the peer's workers come on top).

First it shows that with equal weights both compute the same maps, scores and losses. On a GPU it
goes on with the share of its peak speed that training of large patch 7 reaches, over 200 steps.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml
from PIL import Image, ImageOps
from stfpm import subset

HERE = Path(__file__).resolve().parent
PRECISIONS = {"float32": "no", "bf16": "bf16"}
CATEGORY_IMAGES, EPOCHS = 219, 4000  # a category of MVTec AD, and the original's training of it
ASK = """
import dataclasses, json, sys, torch
from kdad_dist.models.mae import PRESETS
print(json.dumps({"architecture": dataclasses.asdict(PRESETS[sys.argv[1]]),
    "torch": torch.__version__, "cuda": torch.cuda.is_available()}))
"""


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    cpu_seconds: float
    mebibytes: float
    output: str


class Row(NamedTuple):
    """One line of a table; rates are images per second."""

    whole: float
    loop: float
    cpu_seconds: float
    mebibytes: float

    @classmethod
    def of(cls, cost: Cost, images: int, loop: float) -> "Row":
        return cls(images / cost.seconds, loop, cost.cpu_seconds / images, cost.mebibytes)


def run(*words: object, **environment: str) -> Cost:
    """Runs Python on these words to the end.

    This process imports no torch: the peak that the system reports of a child counts what its
    parent held when it was started.
    """
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)} | environment
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10, output)


def last_line(cost: Cost) -> dict[str, Any]:
    return json.loads(cost.output.splitlines()[-1])


def as_png(folder: Path) -> None:
    """Puts a PNG file in the place of every picture of another kind."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix != ".png":
            with Image.open(path) as image:
                ImageOps.exif_transpose(image).convert("RGB").save(path.with_suffix(".png"))
            path.unlink()


class Bench:
    """The files of a comparison, and its measurements."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.category = work / options.category.name
        subset(options.category, self.category, options.train_images, options.test_images)
        as_png(self.category)
        self.train_images = len(list((self.category / "train/good").iterdir()))
        self.about = last_line(run("-c", ASK, options.preset))
        self.architecture = work / "architecture.json"
        self.architecture.write_text(json.dumps(self.about["architecture"]))
        self.weights = work / "ours.safetensors"
        self.packing = self.kdad("pack", self.category, work / "shards", "--size", 0).seconds
        self.config = self.write_config("benchmark", work / "shards", options.preset)
        self.runs = 0

    def write_config(self, name: str, shards: Path, preset: str) -> Path:
        options = self.options
        margin = round(1.045 * options.size) - options.size
        text = {
            "name": name,
            "data": {
                "shards": str(shards),
                "image_size": options.size,
                "val_fraction": 0,
                "augment": {"crop_margin": margin, "brightness": 0.02, "saturation": 0.02},
            },
            "method": {
                "name": "loramae",
                "preset": preset,
                "weights": "random",
                "inference": {"pattern": "stripes", "error": "normalised"},  # as the original
                "freeze_random": True,
            },
            "optim": {
                "name": "adamw",
                "blr": 1e-2,
                "betas": [0.9, 0.95],
                "weight_decay": 1e-3,
                "decay_vectors": False,
                "schedule": "cosine",
                "warmup_epochs": 2,
            },
            "train": {"epochs": options.epochs, "batch_size": options.batch},
            "checkpoint": {"every_minutes": None},
            "score": {"checkpoint": "last", "smooth_sigma": 2, "smooth_radius": 4},
        }
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(text))
        return path

    def kdad(self, *words: object, cache: str = "cache") -> Cost:
        threads, folder = str(self.options.threads), str(self.work / cache)
        return run("-m", "kdad_dist", *words, OMP_NUM_THREADS=threads, KDAD_CACHE=folder)

    def peer(self, what: str, *words: object) -> tuple[Cost, dict[str, Any]]:
        options = self.options
        common = ["--size", options.size, "--batch", options.batch, "--threads", options.threads]
        common += ["--workers", options.threads]
        script = HERE / "peer_mae.py"
        cost = run(script, what, self.category, self.architecture, *common, *words)
        return cost, last_line(cost)

    def train_peer(self) -> Row:
        cost, result = self.peer("train", "--epochs", self.options.epochs)
        print(f"  the peer's loss is {result['loss']:.4f} in the end", file=sys.stderr)
        return Row.of(cost, result["images"], result["last_epoch_images_per_second"])

    def train_ours(self, precision: str) -> tuple[Row, Path]:
        """Trains a new run, its cache empty."""
        self.runs += 1
        folder = self.work / f"run-{self.runs}"
        words = ["train", self.config, f"output={folder}", f"train.precision={precision}"]
        cost = self.kdad(*words, cache=f"cache-{self.runs}")
        lines = metric_lines(folder)
        print(f"  our loss is {lines[-1]['loss']:.4f} in the end", file=sys.stderr)
        pace = median(line["images_per_second"] for line in lines)
        return Row.of(cost, self.train_images * self.options.epochs, pace), folder

    def same(self, folder: Path) -> str:
        """How far the peer is from ours, given the weights of this run, in words."""
        script = HERE / "peer_mae_same.py"
        result = last_line(run(script, folder, self.architecture, self.weights))
        verdict = "the same" if result["map_difference"] < 1e-4 else "NOT the same"
        return (
            f"{verdict} with equal weights: maps of {result['images']} images differ by "
            f"{result['map_difference']:.1e} at most (their maximum {result['map_maximum']:.2f}), "
            f"training losses by {result['loss_difference']:.1e} (of {result['loss']:.4f}); "
            f"largest element of a LoRA B {result['largest_lora_b']:.3f}"
        )

    def infer_peer(self) -> tuple[Row, dict[str, float]]:
        cost, result = self.peer("infer", "--weights", self.weights)
        return Row.of(cost, result["images"], result["images_per_second"]), result["scores"]

    def infer_ours(self, precision: str, folder: Path) -> tuple[Row, dict[str, float]]:
        cost = self.kdad("score", folder, f"score.precision={precision}")
        origin = json.loads((folder / "metrics-last.json").read_text())["provenance"]
        with (folder / "scores-last/scores.csv").open(encoding="utf-8") as file:
            scores = {row["key"]: float(row["pred_score"]) for row in csv.DictReader(file)}
        return Row.of(cost, origin["images"], origin["images_per_second"]), scores

    def utilisation(self) -> str:
        """What share of a GPU's peak the training of large patch 7 reaches, in words."""
        folder, options = self.work / "large", self.options
        pictures = folder / "images/noise/train/good"
        pictures.mkdir(parents=True)
        for number in range(CATEGORY_IMAGES):
            noise = Image.frombytes("RGB", (256, 256), os.urandom(3 * 256**2))
            noise.save(pictures / f"{number:03d}.png")
        self.kdad("pack", folder / "images/noise", folder / "shards")
        config = self.write_config("large", folder / "shards", "mae_vit_large_patch7")
        words = ["data.cache=device", "train.precision=bf16", f"train.compile={options.compile}"]
        words += ["train.epochs=null", "train.steps=250", "train.log_every=50"]
        words += [f"train.batch_size={options.gpu_batch}", "data.image_size=224"]
        self.kdad("train", config, f"output={folder / 'run'}", *words)
        lines = metric_lines(folder / "run")[1:]
        pace = 1 / (sum(1 / line["images_per_second"] for line in lines) / len(lines))
        minutes = CATEGORY_IMAGES * EPOCHS / pace / 60
        used = {
            name: " / ".join(f"{line[name]:.3g}" for line in lines if name in line) or "unknown"
            for name in ("tflops", "mfu")
        }
        return (
            f"mae_vit_large_patch7, bf16, batch {options.gpu_batch}, steps 51 to 250: "
            f"{pace:.1f} images/s, TFLOP/s {used['tflops']}, MFU {used['mfu']} (target 0.4); "
            f"{CATEGORY_IMAGES} images x {EPOCHS} epochs would take {minutes:.1f} min (target 30)"
        )


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run that hold a pace."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "images_per_second" in line]


def best(rows: list[Row]) -> Row:
    """The best of each column over the rounds."""
    whole, loop, cpu_seconds, mebibytes = zip(*rows, strict=True)
    return Row(max(whole), max(loop), min(cpu_seconds), min(mebibytes))


def table(title: str, rows: dict[str, Row]) -> str:
    lines = [f"{title:16} {'whole':>9} {'loop':>9} {'CPU s':>8} {'MiB':>7}   against the peer"]
    peer = rows["peer"]
    for name, row in rows.items():
        lines.append(
            f"{name:16} {row.whole:9.2f} {row.loop:9.2f} {row.cpu_seconds:8.3f} "
            f"{row.mebibytes:7.0f}   whole {row.whole / peer.whole:5.2f}x  "
            f"loop {row.loop / peer.loop:5.2f}x  CPU {peer.cpu_seconds / row.cpu_seconds:5.2f}x  "
            f"memory {row.mebibytes / peer.mebibytes:4.2f}x"
        )
    return "\n".join(lines)


def measure(bench: Bench, rounds: int) -> None:
    training: dict[str, list[Row]] = {}
    scoring: dict[str, list[Row]] = {}
    for number in range(rounds):
        keep(training, "peer", bench.train_peer())
        trained = {}
        for name, precision in PRECISIONS.items():
            row, trained[name] = bench.train_ours(precision)
            keep(training, f"ours, {name}", row)
        if number == 0:
            print(bench.same(trained["float32"]))
        row, theirs = bench.infer_peer()
        keep(scoring, "peer", row)
        for name, precision in PRECISIONS.items():
            row, scores = bench.infer_ours(precision, trained["float32"])
            keep(scoring, f"ours, {name}", row)
            if number == 0:
                print(f"scores, {name}: {distance(scores, theirs)}")
    for title, measured in (("training", training), ("scoring", scoring)):
        print(table(title, {name: best(rows) for name, rows in measured.items()}))


def keep(measured: dict[str, list[Row]], name: str, row: Row) -> None:
    measured.setdefault(name, []).append(row)
    print(f"  {name}: {row.whole:.2f}, {row.loop:.2f} images/s", file=sys.stderr)


def distance(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """The largest relative difference between the scores of the same files, in words."""
    pairs = [(ours[key], next(v for k, v in theirs.items() if key.endswith(k))) for key in ours]
    worst = max(abs(a - b) / b for a, b in pairs)
    return f"of {len(pairs)} images differ from the peer's by {worst:.1e} of their value at most"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("category", type=Path, help="in the layout of MVTec AD")
    parser.add_argument("--preset", default="mae_vit_small_patch7")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=28)
    parser.add_argument("--test-images", type=int, default=16, help="of each kind")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gpu-batch", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="large patch 7 on a GPU")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        print(
            f"{options.preset} at {options.size}, batch {options.batch}, {bench.train_images} "
            f"images x {options.epochs} epochs, {options.threads} threads, "
            f"torch {bench.about['torch']}; packed in {bench.packing:.1f} s"
        )
        measure(bench, options.rounds)
        print(bench.utilisation() if bench.about["cuda"] else "no GPU: its share is not measured")


if __name__ == "__main__":
    main()
