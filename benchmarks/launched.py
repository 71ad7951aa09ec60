"""What several benchmarks share: images of noise, configurations, and launches of a script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from kdad_dist.config.load import load
from kdad_dist.config.run import RunConfig
from kdad_dist.data.writer import pack
from kdad_dist.runtime.environment import describe
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.stopping import StopRequest
from kdad_dist.train.build import Run, build

REPOSITORY = Path(__file__).parent.parent
RANDOM = {"weights": "random", "freeze_random": True}
METHODS: dict[str, dict[str, Any]] = {
    "stfpm": {"name": "stfpm", "teacher": {"backbone": "resnet18", "weights": "random"}},
    "large": {"name": "loramae", "preset": "mae_vit_large_patch7", **RANDOM},
    "small": {"name": "loramae", "preset": "mae_vit_small_patch7", **RANDOM},
    "tiny": {"name": "loramae", "preset": "mae_vit_tiny_patch8", **RANDOM},
}
"""By the names that the benchmarks' options take."""
SIZES = {"stfpm": 256, "large": 224, "small": 224, "tiny": 64}


def noise(folder: Path, images: int, side: int = 256) -> Path:
    """Packs so many random images to train on, and two to test on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 2)):
        place = folder / f"images/box/{split}/good"
        place.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    pack(folder / "images", folder / "shards")
    return folder / "shards"


def configure(folder: Path, shards: Path, method: str, **train: Any) -> Path:
    """A configuration file without validation or checkpoints but the last."""
    values = {
        "name": "benchmark",
        "output": str(folder / "run"),
        "data": {"shards": str(shards), "val_fraction": 0, "image_size": SIZES[method]},
        "method": METHODS[method],
        "optim": {"name": "sgd" if method == "stfpm" else "adamw", "lr": 1.0e-3},
        "train": {"log_every": 1, **train},
        "checkpoint": {"every_minutes": None},
    }
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def settings(folder: Path, shards: Path, method: str, **train: Any) -> RunConfig:
    return load(configure(folder, shards, method, **train))


def assembled(config: RunConfig, here: Session) -> Run:
    """The training of a configuration, ready to take steps."""
    return build(config, here, StopRequest(config.directory))


def command(words: list[str], mode: str = "cpu", processes: int = 1) -> dict[str, Any]:
    """How to start Python's words as `launch/train.sh` starts kdad, for subprocess."""
    source = 'set -eu; source launch/environment.sh; exec "${launcher[@]}" "$@"'
    asked = {"KDAD_MODE": mode, "KDAD_PROCESSES": str(processes), "KDAD_PYTHON": sys.executable}
    return {
        "args": ["bash", "-c", source, "launch", *words],
        "env": {**os.environ, "PYTHONPATH": str(REPOSITORY), **asked},
        "cwd": REPOSITORY,
        "text": True,
    }


def answer_of(words: list[str], mode: str = "cpu", processes: int = 1) -> dict[str, Any]:
    """The JSON that is the last line which the launched program prints."""
    run = subprocess.run(**command(words, mode, processes), capture_output=True)
    if run.returncode:
        sys.exit(f"{words} under {mode} ended with {run.returncode}:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def machine() -> str:
    """Where and with what a figure was measured."""
    facts = describe()
    where = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"
    return f"{where}; torch {torch.__version__}; commit {facts['commit']}"
