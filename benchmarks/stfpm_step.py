"""The bare STFPM training step: a plain float32 loop as the notebook writes it, and ours.

    python benchmarks/stfpm_step.py WEIGHTS.safetensors [--threads 2] [--compile]

ResNet-18, layers 1 to 3, 256 px, batch 32, images already in memory. The variants take turns, and
the best of several rounds counts, so that other work on the machine disturbs all of them alike.
`--cpu-time` divides by the process's CPU seconds instead of the clock's: the figure to trust with
`--threads 1` on a machine that is busy with other things. `--compile` compiles our student, as
`train.compile` does. Prints images/s and the ratio to the plain loop.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kdad_dist.config_methods import StfpmConfig, TeacherConfig
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.types import Batch, Features

SIDE, LAYERS = 256, (1, 2, 3)
Step = Callable[[], None]


def plain_step(image: torch.Tensor, weights: Path) -> Step:
    """As the notebook: float32, contiguous, the loss layer by layer, Adam."""
    teacher = timm.create_model("resnet18", features_only=True, out_indices=LAYERS).eval()
    teacher.load_state_dict(load_file(weights))
    teacher = teacher.to(image.device)
    student = timm.create_model("resnet18", features_only=True, out_indices=LAYERS).to(image.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=4e-4)

    def step() -> None:
        with torch.no_grad():
            targets = teacher(image)
        loss = 0
        for target, feature in zip(targets, student(image), strict=True):
            target, feature = F.normalize(target), F.normalize(feature)
            height, width = target.shape[-2:]
            loss = loss + (0.5 / (height * width)) * (target - feature).square().sum()
        optimizer.zero_grad()
        (loss / len(LAYERS)).backward()
        optimizer.step()

    return step


def our_step(
    image: torch.Tensor, weights: Path, bf16: bool, cached: bool, compiled: bool = False
) -> Step:
    teacher = TeacherConfig("resnet18", str(weights), list(LAYERS))
    method = Stfpm(StfpmConfig(teacher=teacher), seed=0).to(image.device)
    if compiled:
        method.student.compile()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.4, momentum=0.9)
    image = image.contiguous(memory_format=torch.channels_last)
    row = torch.arange(len(image), device=image.device)

    def precision() -> AbstractContextManager:
        return torch.autocast(image.device.type, torch.bfloat16) if bf16 else nullcontext()

    targets: Features | None = None
    if cached:
        with precision():
            targets = method.targets(image)

    def step() -> None:
        with precision():
            losses = method(Batch(image, row, row, targets))["loss"]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return step


def seconds(step: Step, device: torch.device, clock: Callable[[], float], steps: int) -> float:
    start = clock()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="ImageNet ResNet-18, stem to layer3, timm names")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    image = torch.rand(args.batch, 3, SIDE, SIDE, device=device)
    variants = {
        "plain loop, float32": plain_step(image, args.weights),
        "ours, float32": our_step(image, args.weights, bf16=False, cached=False),
        "ours, bf16": our_step(image, args.weights, bf16=True, cached=False),
        "ours, bf16, cached teacher": our_step(image, args.weights, bf16=True, cached=True),
    }
    if args.compile:
        variants["ours, bf16, compiled student"] = our_step(
            image, args.weights, bf16=True, cached=False, compiled=True
        )
    for step in variants.values():
        step()
    best = dict.fromkeys(variants, float("inf"))
    steps = 20 if device.type == "cuda" else 1
    for _ in range(args.rounds):
        for name, step in variants.items():
            best[name] = min(best[name], seconds(step, device, clock, steps))
    plain = best["plain loop, float32"]
    unit = "CPU second" if args.cpu_time else "second"
    print(f"{device}, {args.threads} threads, batch {args.batch}, images per {unit}:")
    for name, value in best.items():
        print(f"{name:32} {args.batch / value:9.1f}   {plain / value:5.2f}x")


if __name__ == "__main__":
    main()
