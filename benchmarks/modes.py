"""Images per second and peak memory of training in each mode of a launch.

    python benchmarks/modes.py [--method large] [--batch 32] [--steps 20] [--processes 1]
    KDAD_DEVICE=cpu python benchmarks/modes.py --method tiny --batch 8 --steps 4 --processes 2

DDP, FSDP2, ZeRO-2 and ZeRO-3, on the GPUs of this machine (NCCL), or on its CPU. Each mode is a
launch of its own; the batch is in memory, bfloat16, and the median step counts. Ratios are to the
first mode.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from launched import METHODS, answer_of, assembled, machine, noise, settings
from scaling import seconds

from kdad_dist.runtime import session
from kdad_dist.runtime.account import peak_memory
from kdad_dist.train.loop import take_step
from kdad_dist.wording import readable

MODES = {"ddp": "multi_gpu", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
"""By what KDAD_MODE calls them."""


def work(method: str, folder: Path, batch: int, steps: int) -> None:
    """Of one of the launched processes."""
    train = {"steps": 1, "batch_size": batch, "precision": "bf16"}
    config = settings(folder, folder / "shards", method, **train)
    with session.start("bf16", trains=True) as here:
        run = assembled(config, here)
        run.method.train()
        [micros] = run.loader.steps(0, 1)
        step = seconds(lambda: take_step(run, micros, 1e-3), here, steps)
        facts = {"mode": here.mode, "step": step, "peak": peak_memory(here.device)}
    if here.is_main:
        print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="large", choices=METHODS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.method, Path(options.work), options.batch, options.steps)
        return
    on_cpu = os.environ.pop("KDAD_DEVICE", "") == "cpu" or not torch.cuda.is_available()
    print(machine())
    first = options.modes[0]
    print(
        "| mode | processes | images/s | peak memory of a process "
        f"| images/s against {first} | memory against {first} |\n|" + 6 * "---|"
    )
    measured = []
    with tempfile.TemporaryDirectory() as name:
        noise(Path(name), options.batch)
        for mode in options.modes:
            launched = "cpu" if on_cpu and mode == "ddp" else MODES[mode]
            os.environ["KDAD_DEVICE"] = "cpu" if on_cpu and mode != "ddp" else ""
            words = [sys.argv[0], "--work", name, "--method", options.method]
            words += ["--batch", str(options.batch), "--steps", str(options.steps)]
            found = answer_of(words, launched, options.processes)
            assert found["mode"] == mode, found
            measured.append(found)
            print(
                f"| {mode} | {options.processes} | {options.batch / found['step']:.1f} "
                f"| {readable(found['peak'])} | {measured[0]['step'] / found['step']:.2f}x "
                f"| {found['peak'] / measured[0]['peak']:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
