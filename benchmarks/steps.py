"""What the benchmarks of a bare training step share: our step, and variants that take turns.

The best of several rounds counts, so that other work on the machine disturbs all variants alike.
`--cpu-time` divides by the process's CPU seconds instead of the clock's: the figure to trust with
`--threads 1` on a machine that is busy with other things. Memory is the most that a step holds at
once beside the weights: what is kept for the backward pass, gradients and batch.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from kdad_dist.methods.base import Method
from kdad_dist.runtime.activations import Living
from kdad_dist.types import Batch

Step = Callable[[], object]


def options(doc: str | None, batch: int, size: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--size", type=int, default=size)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true")
    return parser


def images(args: argparse.Namespace) -> Tensor:
    """The batch of all variants, in memory already."""
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, batch {args.batch}, {args.size} px")
    return torch.rand(args.batch, 3, args.size, args.size, device=args.device)


def our_step(method: Method, optimizer: Optimizer, image: Tensor, bf16: bool) -> Step:
    """Forward, backward and update of a method, as `kdad train` takes them."""
    image = image.contiguous(memory_format=torch.channels_last)
    row = torch.arange(len(image), device=image.device)

    def precision() -> torch.autocast:
        return torch.autocast(image.device.type, torch.bfloat16, enabled=bf16)

    with precision():
        targets = method.targets(image) if method.caches_targets else None

    def step() -> None:
        with precision():
            losses = method(Batch(image, row, row, targets))["loss"]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return step


def compare(title: str, variants: dict[str, Step], args: argparse.Namespace) -> None:
    """Prints images/s and memory of each variant, and their ratios to the first."""
    on_gpu = args.device == "cuda"
    clock = time.process_time if args.cpu_time else time.perf_counter
    repeats = 20 if on_gpu else 1
    best = dict.fromkeys(variants, float("inf"))
    memory = {name: _memory(step, on_gpu) for name, step in variants.items()}
    for _ in range(args.rounds):
        for name, step in variants.items():
            started = clock()
            for _ in range(repeats):
                step()
            if on_gpu:
                torch.cuda.synchronize()
            best[name] = min(best[name], (clock() - started) / repeats)
    first = next(iter(variants))
    unit = "CPU second" if args.cpu_time else "second"
    print(f"{title}: images per {unit}, and MiB held")
    for name, seconds in best.items():
        speed = f"{args.batch / seconds:9.2f} {best[first] / seconds:6.2f}x"
        share = memory[name] / memory[first]
        print(f"  {name:28}{speed} {memory[name] / 2**20:9.0f} {share:6.2f}x", flush=True)


def _memory(step: Step, on_gpu: bool) -> int:
    step()
    if not on_gpu:
        with Living([]) as living:
            step()
        return living.peak
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - held
