"""What is said of memory before and during a training."""

import resource
from pathlib import Path

import torch
from torch import nn

from kdad_dist.config import AugmentConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from kdad_dist.methods.base import Method
from kdad_dist.runtime.account import expected, peak_memory, readable
from kdad_dist.types import Batch, Losses, Prediction


class Half(Method):
    """1 MiB of weights that are trained, 3 MiB that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(
            nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False)
        )
        self.student[1].requires_grad_(False)
        self.teacher = nn.Linear(1024, 512, bias=False).requires_grad_(False)

    def forward(self, batch: Batch) -> Losses:
        raise NotImplementedError

    def predict(self, image: torch.Tensor) -> Prediction:
        raise NotImplementedError


def said(optim: OptimConfig, **data: object) -> str:
    config = RunConfig("x", DataConfig("s", image_size=32, **data), optim, TrainConfig(steps=1))
    return expected(config, Half(), images=1024)


def test_weights_gradients_and_moments_are_told_apart() -> None:
    assert said(OptimConfig("adamw", lr=1)).startswith(
        "memory of a process, beside activations: weights 4 MiB (1 MiB of them trained), "
        "gradients 1 MiB, optimizer 2 MiB"
    )
    assert "optimizer 1 MiB" in said(OptimConfig("sgd", lr=1))
    assert "optimizer 0 B" in said(OptimConfig("sgd", lr=1, momentum=0))


def test_decoded_pixels_are_told_with_their_place() -> None:
    optim = OptimConfig(lr=1)
    assert said(optim).endswith("pixels of 1024 images 3 MiB, shared by the processes of a node")
    assert said(optim, cache="device").endswith("3 MiB, on each device")
    assert "12 MiB" in said(optim, augment=AugmentConfig(crop_margin=32))
    assert "pixels" not in said(optim, cache="none")
    assert "pixels" not in said(optim, access="stream")


def test_the_peak_of_a_process_is_at_least_what_it_has_now() -> None:
    held = torch.ones(16 * 2**18)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * resource.getpagesize()
    assert held.nbytes < 0.99 * resident < peak_memory(torch.device("cpu"))


def test_sizes_are_readable() -> None:
    sizes = [0, 17, 1500, 243 * 2**20, 1000 * 2**20, 1.5 * 2**50]
    assert [readable(size) for size in sizes] == [
        "0 B", "17 B", "1.46 KiB", "243 MiB", "0.977 GiB", "1.54e+03 TiB",
    ]  # fmt: skip
