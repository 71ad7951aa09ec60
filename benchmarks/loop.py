"""What the training loop costs beside the step itself: `fit` against its own bare step.

    python benchmarks/loop.py [--steps 40] [--rounds 3]

The bare step is forward, backward and update of one batch that is already in memory, again and
again; `fit` reads, checks, logs and counts around the same step. They take turns in one process, so
that other work on the machine disturbs both alike. Prints the ratio of the best times.
"""

import argparse
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from kdad_dist.config import RunConfig, load
from kdad_dist.data.writer import pack
from kdad_dist.runtime import session
from kdad_dist.runtime.stopping import StopRequest
from kdad_dist.train import fit, take_step
from kdad_dist.train_build import build


def make(folder: Path, images: int, steps: int) -> RunConfig:
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 2)):
        place = folder / f"images/box/{split}/good"
        place.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    pack(folder / "images", folder / "shards")
    text = {
        "name": "loop",
        "output": str(folder / "run"),
        "data": {"shards": str(folder / "shards"), "val_fraction": 0},
        "method": {"teacher": {"weights": "random"}},
        "optim": {"name": "sgd", "lr": 0.1},
        "train": {"steps": steps, "batch_size": 32, "precision": "bf16"},
        "checkpoint": {"every_minutes": None},
    }
    (folder / "loop.yaml").write_text(yaml.safe_dump(text))
    return load(folder / "loop.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    best = {"bare step": float("inf"), "fit": float("inf")}
    with tempfile.TemporaryDirectory() as name, redirect_stderr(StringIO()):
        config = make(Path(name), 64, options.steps)
        config.directory.mkdir()
        with session.start(config.train.precision) as here:
            for _ in range(options.rounds):
                run = build(config, here, StopRequest(config.directory))
                run.method.train()
                micros = next(iter(run.loader.steps(0, 1)))
                take_step(run, micros, 0.1)
                start = time.perf_counter()
                for _ in range(options.steps):
                    take_step(run, micros, 0.1)
                if here.device.type == "cuda":
                    torch.cuda.synchronize()
                best["bare step"] = min(best["bare step"], time.perf_counter() - start)
                start = time.perf_counter()
                fit(run)
                best["fit"] = min(best["fit"], time.perf_counter() - start)
                for file in sorted(config.directory.rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
    for kind, seconds in best.items():
        print(f"{kind:10} {32 * options.steps / seconds:8.1f} images/s")
    print(f"the loop adds {100 * (best['fit'] / best['bare step'] - 1):.1f} %")


if __name__ == "__main__":
    main()
