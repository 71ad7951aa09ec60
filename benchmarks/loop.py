"""What the training loop costs beside the step itself: `fit`, a bare accelerate loop, a bare step.

    python benchmarks/loop.py [--method stfpm] [--steps 12] [--rounds 5]

The bare step is forward, backward and update of one batch that is already in memory, again and
again. The accelerate loop is what its documentation shows: a prepared DataLoader over images in
memory, `backward`, clipping, `step`, and the loss read every ten steps. `fit` reads, checks, logs,
counts, watches for stop requests and saves at the end. All three train the same network with the
same optimizer, and take turns in one process, so that other work on the machine disturbs them
alike. Prints medians, and the median over the rounds of the ratios within a round.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from launched import SIZES, assembled, machine, noise, settings
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kdad_dist.config.run import RunConfig
from kdad_dist.methods import build_method
from kdad_dist.runtime import session
from kdad_dist.runtime.optimizer import build_optimizer
from kdad_dist.runtime.session import Session
from kdad_dist.train.build import Run
from kdad_dist.train.loop import fit, take_step
from kdad_dist.types import Batch


def bare_steps(run: Run, steps: int) -> None:
    run.method.train()
    [micros] = run.loader.steps(0, 1)
    for _ in range(steps):
        take_step(run, micros, 1e-3)


def accelerate_loop(config: RunConfig, here: Session, pixels: Tensor, steps: int) -> float:
    """Seconds of so many steps."""
    accelerator, method = here.accelerator, build_method(config)
    method.to(here.device, memory_format=torch.channels_last).train()  # pyright: ignore
    data = TensorDataset(pixels, torch.arange(len(pixels)))
    loader = DataLoader(data, config.train.batch_size, shuffle=True)
    optimizer = build_optimizer(config, method.student)
    method.student, optimizer, loader = accelerator.prepare(method.student, optimizer, loader)
    start = time.perf_counter()
    for step, (image, row) in enumerate(islice(endless(loader), steps)):
        image = image.float().div_(255).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            loss = method(Batch(image, row, row))["loss"].mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(method.student.parameters(), math.inf)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            loss.item()
    wait(here)
    return time.perf_counter() - start


def endless(loader: Iterable) -> Iterator:
    """The loader's batches, epoch after epoch."""
    while True:
        yield from loader


def wait(here: Session) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], None], here: Session) -> float:
    start = time.perf_counter()
    work()
    wait(here)
    return time.perf_counter() - start


def one_round(config: RunConfig, here: Session, pixels: Tensor, number: int) -> dict[str, float]:
    """Seconds of each way; another one begins in each round."""
    run = assembled(config, here)
    steps = run.steps
    bare_steps(run, 2)
    ways = [
        ("bare step", lambda: timed(lambda: bare_steps(run, steps), here)),
        ("accelerate loop", lambda: accelerate_loop(config, here, pixels, steps)),
        ("fit", lambda: timed(lambda: fit(run), here)),
    ]
    first = number % len(ways)
    found = {name: way() for name, way in [*ways[first:], *ways[:first]]}
    shutil.rmtree(config.directory)
    config.directory.mkdir()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="stfpm", choices=SIZES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    side = SIZES[options.method]
    with tempfile.TemporaryDirectory() as name, redirect_stderr(StringIO()):
        folder = Path(name)
        train = {"steps": options.steps, "precision": "bf16", "log_every": 10}
        config = settings(folder, noise(folder, 64), options.method, **train)
        config.directory.mkdir()
        pixels = torch.randint(0, 255, (64, 3, side, side), dtype=torch.uint8)
        with session.start(config.train.precision, trains=True) as here:
            rounds = [one_round(config, here, pixels, number) for number in range(options.rounds)]
    print(machine())
    for way in sorted(rounds[0]):
        seconds = median(found[way] for found in rounds)
        print(f"{way:16} {32 * options.steps / seconds:8.1f} images/s")
    for way in ("accelerate loop", "bare step"):
        more = median(found["fit"] / found[way] for found in rounds) - 1
        print(f"fit takes {100 * more:+.1f} % of the time of the {way} more")


if __name__ == "__main__":
    main()
