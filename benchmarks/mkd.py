"""Multiresolution distillation: the bare training step and SmoothGrad, plain and ours.

    python benchmarks/mkd.py [--threads 2] [--batch 16] [--size 128] [--copies 5]

The plain ones do what the original does: float32, a teacher whose weights have gradients too, no
cache; maps image by image. VGG16 with random weights, which take as long as others, and the small
cloner; images already in memory. The variants take turns, and the best of several rounds counts.
`--cpu-time` divides by the process's CPU seconds instead of the clock's: the figure to trust with
`--threads 1` on a machine that is busy with other things. Memory is the most that a step holds at
once beside the weights: what is kept for the backward pass, gradients and batch.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdad_dist.config_methods import MkdConfig, MkdTeacherConfig
from kdad_dist.methods.mkd import Mkd
from kdad_dist.runtime.activations import Living
from kdad_dist.types import Batch

Step = Callable[[], object]
VGG = MkdTeacherConfig(weights="random")


def plain_loss(method: Mkd, image: Tensor, first: int = 0) -> Tensor:
    loss = image.new_zeros(())
    pairs = zip(method._teacher_maps(image), method._student_maps(image), strict=True)
    for target, feature in list(pairs)[first:]:
        cosine = F.cosine_similarity(target.flatten(1), feature.flatten(1))
        loss = loss + (1 - cosine).mean() + 0.01 * F.mse_loss(feature, target)
    return loss


def plain(image: Tensor) -> Mkd:
    method = Mkd(MkdConfig(teacher=VGG), image.shape[-1], seed=0)
    method.requires_grad_(True)
    return method.to(image.device, memory_format=torch.contiguous_format)  # pyright: ignore


def plain_step(image: Tensor) -> Step:
    method = plain(image)
    optimizer = torch.optim.Adam(method.student.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        plain_loss(method, image).backward()
        optimizer.step()

    return step


def our_step(image: Tensor, bf16: bool, cached: bool) -> Step:
    method = Mkd(MkdConfig(teacher=VGG, cache_teacher=cached), image.shape[-1], seed=0)
    method.to(image.device)
    optimizer = torch.optim.Adam(method.student.parameters(), lr=1e-3)
    image = image.contiguous(memory_format=torch.channels_last)
    row = torch.arange(len(image), device=image.device)

    def precision() -> torch.autocast:
        return torch.autocast(image.device.type, torch.bfloat16, enabled=bf16)

    with precision():
        targets = method.targets(image) if cached else None

    def step() -> None:
        with precision():
            losses = method(Batch(image, row, row, targets))["loss"]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return step


def plain_smoothgrad(image: Tensor, copies: int) -> Step:
    method = plain(image).eval()

    def step() -> None:
        for one in image:
            total = torch.zeros_like(one)
            for _ in range(copies):
                noisy = (one + 0.05 * torch.randn_like(one))[None].requires_grad_()
                plain_loss(method, noisy, first=1).backward()
                assert noisy.grad is not None
                total += noisy.grad[0].abs()
        method.zero_grad()

    return step


def our_smoothgrad(image: Tensor, copies: int, bf16: bool) -> Step:
    config = MkdConfig(teacher=VGG, localise="smoothgrad", noise_copies=copies)
    method = Mkd(config, image.shape[-1], seed=0).eval().requires_grad_(False).to(image.device)
    image = image.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            method.predict(image)

    return step


def compare(title: str, variants: dict[str, Step], args: argparse.Namespace) -> None:
    clock = time.process_time if args.cpu_time else time.perf_counter
    best = dict.fromkeys(variants, float("inf"))
    memory = {}
    for name, step in variants.items():
        step()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            step()
            memory[name] = torch.cuda.max_memory_allocated() - held
        else:
            with Living([]) as living:
                step()
            memory[name] = living.peak
    for _ in range(args.rounds):
        for name, step in variants.items():
            started = clock()
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], clock() - started)
    first = next(iter(variants))
    unit = "CPU second" if args.cpu_time else "second"
    print(f"{title}: images per {unit}, and MiB held")
    for name, seconds in best.items():
        speed = f"{args.batch / seconds:9.2f} {best[first] / seconds:6.2f}x"
        share = memory[name] / memory[first]
        print(f"  {name:28}{speed} {memory[name] / 2**20:9.0f} {share:6.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--copies", type=int, default=5, help="noisy copies; their cost is linear")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    image = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    print(f"{args.device}, {args.threads} threads, batch {args.batch}, {args.size} px")
    training = {
        "plain loop, float32": plain_step(image),
        "ours, float32": our_step(image, bf16=False, cached=False),
        "ours, bf16": our_step(image, bf16=True, cached=False),
        "ours, bf16, cached teacher": our_step(image, bf16=True, cached=True),
    }
    compare("training", training, args)
    del training
    maps = {
        "plain, image by image": plain_smoothgrad(image, args.copies),
        "ours, float32": our_smoothgrad(image, args.copies, bf16=False),
        "ours, bf16": our_smoothgrad(image, args.copies, bf16=True),
    }
    compare(f"SmoothGrad, {args.copies} copies", maps, args)


if __name__ == "__main__":
    main()
