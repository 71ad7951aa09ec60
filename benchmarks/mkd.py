"""Multiresolution distillation: the bare training step and SmoothGrad, plain and ours.

    python benchmarks/mkd.py [--threads 2] [--batch 16] [--size 128] [--images 2] [--copies 50]

The plain ones do what the original does: float32, a teacher whose weights have gradients too, no
cache; maps image by image and copy by copy. VGG16 with random weights, which take as long as
others, and the small cloner.
"""

import numpy as np
import torch
import torch.nn.functional as F
from steps import Step, compare, images, options, our_step
from torch import Tensor

from kdad_dist.config.methods import MkdConfig, MkdTeacherConfig
from kdad_dist.methods.mkd import Mkd

VGG = MkdTeacherConfig(weights="random")


def plain_loss(method: Mkd, image: Tensor, first: int = 0) -> Tensor:
    loss = image.new_zeros(())
    pairs = zip(method.teacher(image), method.student(image), strict=True)
    for target, feature in list(pairs)[first:]:
        target = F.max_pool2d(target, 2)  # of a VGG, which does so after each
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


def ours(image: Tensor, bf16: bool, cached: bool) -> Step:
    method = Mkd(MkdConfig(teacher=VGG, cache_teacher=cached), image.shape[-1], seed=0)
    optimizer = torch.optim.Adam(method.to(image.device).student.parameters(), lr=1e-3)
    return our_step(method, optimizer, image, bf16)


def plain_smoothgrad(image: Tensor, copies: int) -> Step:
    """An image and a copy of it at a time, gradients of all weights, maps added up in numpy."""
    method = plain(image).eval()

    def step() -> None:
        for one in image:
            total = np.zeros(one.shape[1:], dtype=np.float32)
            for _ in range(copies):
                noisy = (one + 0.05 * torch.randn_like(one))[None].requires_grad_()
                method.zero_grad()
                plain_loss(method, noisy, first=1).backward()
                assert noisy.grad is not None
                total += noisy.grad[0].abs().cpu().numpy().sum(axis=0)

    return step


def our_smoothgrad(image: Tensor, copies: int, bf16: bool) -> Step:
    config = MkdConfig(teacher=VGG, localise="smoothgrad", noise_copies=copies)
    method = Mkd(config, image.shape[-1], seed=0).eval().requires_grad_(False).to(image.device)
    image = image.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            method.predict(image)

    return step


def main() -> None:
    parser = options(__doc__, batch=16, size=128)
    parser.add_argument("--images", type=int, default=2, help="of SmoothGrad, each with its copies")
    parser.add_argument("--copies", type=int, default=50)
    args = parser.parse_args()
    image = images(args)
    training = {
        "plain loop, float32": plain_step(image),
        "ours, float32": ours(image, bf16=False, cached=False),
        "ours, bf16": ours(image, bf16=True, cached=False),
        "ours, bf16, cached teacher": ours(image, bf16=True, cached=True),
    }
    compare("training", training, args)
    del training
    args.batch, image = args.images, image[: args.images]
    maps = {
        "plain, image by image": plain_smoothgrad(image, args.copies),
        "ours, float32": our_smoothgrad(image, args.copies, bf16=False),
        "ours, bf16": our_smoothgrad(image, args.copies, bf16=True),
    }
    compare(f"SmoothGrad, {args.images} images, {args.copies} copies each", maps, args)


if __name__ == "__main__":
    main()
