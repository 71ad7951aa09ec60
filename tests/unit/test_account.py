"""What is said of memory before and during a training."""

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from kdad_dist.config.data import AugmentConfig, DataConfig
from kdad_dist.config.methods import LoraMaeConfig, MethodConfig, StfpmConfig, TeacherConfig
from kdad_dist.config.run import OptimConfig, RunConfig, TrainConfig
from kdad_dist.methods import build_method
from kdad_dist.methods.base import Method
from kdad_dist.runtime.account import (
    BUCKET,
    checkpoint_bytes,
    expected,
    memory,
    peak_memory,
    state_bytes,
)
from kdad_dist.runtime.modes import MODES
from kdad_dist.runtime.optimizer import build_optimizer
from kdad_dist.runtime.tensors import Tensors
from kdad_dist.types import Batch, Losses, Prediction
from kdad_dist.wording import readable
from tests.needs import REPOSITORY


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
    return expected(config, Half(), 1024, "ddp", 1)


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


MIB = 2**20


def test_each_mode_divides_what_it_says_among_the_processes() -> None:
    """Of `Half`: 2 MiB of student, 1 MiB of it trained, with as much momentum; 2 MiB of teacher."""
    config = RunConfig("x", DataConfig("s"), OptimConfig("sgd", lr=1), TrainConfig(steps=1))
    held = {mode: memory(config, Half(), mode, 4) for mode in MODES}
    quarters = {
        mode: [4 * size / MIB for size in (m.weights, m.gradients, m.optimizer)]
        for mode, m in held.items()
    }
    assert quarters == {
        "ddp": [8, 4, 4],
        "fsdp2": [2, 1, 1],
        # DeepSpeed keeps a copy of its part of the weights beside its part of the momentum.
        "zero1": [8, 4, 2],
        "zero2": [8, 1, 2],
        "zero3": [2, 1, 2],
    }
    assert memory(config, Half(), "ddp", 1).exchange == 0
    assert {m.teacher for m in held.values()} == {2 * MIB}
    assert held["ddp"].exchange == MIB and held["fsdp2"].exchange == 2 * MIB
    assert held["zero3"].exchange == 4 * BUCKET + 2 * MIB
    assert held["zero2"].exchange == held["zero1"].exchange == 2 * 4 * BUCKET


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_buckets_counted_are_those_of_the_launch(stage: int) -> None:
    text = (REPOSITORY / f"launch/deepspeed/zero{stage}.json").read_text()
    settings = json.loads(text)["zero_optimization"]
    assert settings["reduce_bucket_size"] == BUCKET and settings["overlap_comm"]


METHODS = [
    (StfpmConfig(teacher=TeacherConfig("resnet10t", "random", [1, 2])), "sgd"),
    (StfpmConfig(teacher=TeacherConfig("resnet10t", "random", [1, 2])), "adamw"),
    (LoraMaeConfig(preset="mae_vit_tiny_patch8", weights="random", freeze_random=True), "adamw"),
]


@pytest.mark.parametrize(("method", "optim"), METHODS)
def test_optimizer_and_checkpoint_are_as_large_as_foretold(
    method: MethodConfig, optim: str, tmp_path: Path
) -> None:
    config = RunConfig(
        "x",
        DataConfig("s", image_size=64),
        OptimConfig(optim, lr=1),  # pyright: ignore
        TrainConfig(steps=1),
        method=method,
    )
    made = build_method(config)
    optimizer = build_optimizer(config, made.student)
    for parameter in made.student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for held in optimizer.state.values() for value in held.values()]
    assert sum(value.nbytes for value in state) == state_bytes(config, made)
    Tensors(made.student, optimizer).write(tmp_path, None)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert checkpoint_bytes(config, made) == pytest.approx(written, rel=0.02)


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
