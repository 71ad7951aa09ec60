"""Is the memory that `kdad train --dry-run` foretells the memory that a training takes?

    python benchmarks/memory.py

For each case a fresh process computes one forward and backward pass on the CPU, and reads from the
system by how much its resident memory peaked above what it had before. Beside it stands what was
foretold without computing anything.
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from launched import METHODS, SIZES, machine
from pydantic import TypeAdapter

from kdad_dist.config.data import DataConfig
from kdad_dist.config.methods import MethodConfig
from kdad_dist.config.run import OptimConfig, RunConfig, TrainConfig
from kdad_dist.methods import build_method
from kdad_dist.runtime.activations import activations, pass_peak
from kdad_dist.wording import readable

CASES = [
    ("stfpm", 4, "no"),
    ("stfpm", 16, "no"),
    ("stfpm", 16, "bf16"),
    ("small", 4, "no"),
    ("small", 16, "bf16"),
    ("large", 1, "bf16"),
]


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, images: int, precision: str) -> dict[str, int]:
    kind = TypeAdapter(MethodConfig).validate_python(METHODS[name])
    data = DataConfig("s", image_size=SIZES[name])
    config = RunConfig("x", data, OptimConfig(lr=1), TrainConfig(steps=1), method=kind)
    method = build_method(config).train()
    foretold = activations(method, images, SIZES[name], precision)
    # Libraries allocate at their first use; a small pass is done with that.
    pass_peak(copy.deepcopy(method), 1, SIZES[name], precision)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    pass_peak(method, images, SIZES[name], precision)
    return {"foretold": foretold, "measured": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        torch.set_num_threads(1)
        name, images, precision = options.case
        print(json.dumps(measure(name, int(images), precision)))
        return
    print(machine())
    print("| method | images | precision | foretold | measured | measured / foretold |")
    print("|" + 6 * "---|")
    # What is freed goes back to the system at once, so that the peak is one of living tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for case in CASES:
        words = [sys.executable, sys.argv[0], "--case", *map(str, case)]
        run = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        found = json.loads(run.stdout)
        name, images, precision = case
        print(
            f"| {name} | {images} | {precision} | {readable(found['foretold'])} "
            f"| {readable(found['measured'])} | {found['measured'] / found['foretold']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
