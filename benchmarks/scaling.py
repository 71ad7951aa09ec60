"""What a step costs on two processes against one, at the same global batch, and where it goes.

    python benchmarks/scaling.py [--methods stfpm small] [--mode cpu] [--steps 6]

One thread for each process. Beside the step stands an `all_reduce` of as many bytes as the gradient
has, alone. Prints
medians over the steps.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from launched import answer_of, assembled, machine, noise, settings

from kdad_dist.runtime import session
from kdad_dist.runtime.account import peak_memory, trained_bytes
from kdad_dist.runtime.session import Session
from kdad_dist.train.loop import take_step
from kdad_dist.wording import readable

BATCH = {"stfpm": 16, "large": 2, "small": 8, "tiny": 16}


def seconds(work: Callable[[], object], here: Session, times: int) -> float:
    """The median, each begun by all processes together."""
    found = []
    for _ in range(times + 1):  # the first is not counted
        here.barrier()
        start = time.perf_counter()
        work()
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def work(method: str, folder: Path, steps: int) -> None:
    """Of one of the launched processes."""
    torch.set_num_threads(1)
    train = {"steps": 1, "batch_size": BATCH[method], "precision": "bf16"}
    config = settings(folder, folder / "shards", method, **train)
    with session.start("bf16", trains=True) as here:
        run = assembled(config, here)
        run.method.train()
        [micros] = run.loader.steps(0, 1)
        gradient = trained_bytes(run.method)
        step = seconds(lambda: take_step(run, micros, 1e-3), here, steps)
        exchange = 0.0
        if here.world > 1:
            values = torch.zeros(gradient // 4, device=here.device)
            exchange = seconds(lambda: dist.all_reduce(values), here, 4 * steps)
        facts = {"step": step, "exchange": exchange, "gradient": gradient}
        facts |= {"operations": run.operations, "peak": peak_memory(here.device)}
    if here.is_main:
        print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["stfpm", "small"])
    parser.add_argument("--mode", default="cpu", help="KDAD_MODE of the launch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], Path(options.work[1]), options.steps)
        return
    print(machine())
    print(
        "| method | images of a step | 1 process | 2 processes | speed-up "
        "| gradient | its all_reduce | share of the step | rate of one |\n|" + 9 * "---|"
    )
    with tempfile.TemporaryDirectory() as name:
        noise(Path(name), 16)
        for method in options.methods:
            words = [sys.argv[0], "--steps", str(options.steps), "--work", method, name]
            one, two = (answer_of(words, options.mode, processes) for processes in (1, 2))
            rate = one["operations"] * BATCH[method] / one["step"]
            print(
                f"| {method} | {BATCH[method]} | {one['step']:.3f} s | {two['step']:.3f} s "
                f"| {one['step'] / two['step']:.2f} | {readable(two['gradient'])} "
                f"| {1000 * two['exchange']:.1f} ms | {100 * two['exchange'] / two['step']:.1f} % "
                f"| {rate / 1e9:.0f} GFLOP/s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
