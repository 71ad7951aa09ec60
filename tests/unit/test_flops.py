"""Operations per image against counts by hand, and what is known of GPUs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdad_dist.config.methods import LoraMaeConfig, StfpmConfig, TeacherConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.runtime.flops import operations, peak
from kdad_dist.types import Batch, Losses, Prediction

SIDE = 8
CONV = 2 * 3 * 4 * 9 * SIDE**2
"""A 3x3 convolution of the image from 3 to 4 channels."""
LINEAR = 2 * (4 * SIDE**2) * 5
WIDTH, HEADS, TOKENS = 12, 2, SIDE**2


class Toy(Method):
    """A student of images, and where asked a teacher of one convolution."""

    def __init__(self, student: nn.Module, teacher: bool = False) -> None:
        super().__init__()
        self.student = student
        if teacher:
            self.teacher = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)

    def forward(self, batch: Batch) -> Losses:
        if self.teacher is not None and batch.targets is None:
            self.targets(batch.image)
        return {"loss": self.student(batch.image).flatten(1).square().sum(dim=1)}

    def targets(self, image: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (self.teacher(image),)

    def predict(self, image: Tensor) -> Prediction:
        raise NotImplementedError


class Attention(nn.Module):
    """Self-attention over the pixels of an image, its channels widened from 3 to WIDTH."""

    def __init__(self, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.widen = nn.Linear(3, 3 * WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.flatten(2).transpose(1, 2)
        if self.activation_checkpointing:
            return checkpoint(self.attend, pixels, use_reentrant=False)
        return self.attend(pixels)

    def attend(self, pixels: Tensor) -> Tensor:
        qkv = self.widen(pixels).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        return self.last(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * SIDE**2, 5)
    )


def test_a_weight_costs_forward_its_gradient_and_the_one_of_its_input() -> None:
    # The image needs no gradient, so the first layer costs twice and not three times.
    assert operations(Toy(network()), SIDE) == 2 * CONV + 3 * LINEAR


def test_frozen_weights_cost_less() -> None:
    net = network()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    assert operations(Toy(net), SIDE) == CONV + 2 * LINEAR


def test_a_teacher_costs_its_forward_unless_its_output_is_cached() -> None:
    method = Toy(network(), teacher=True)
    assert operations(method, SIDE) == 3 * CONV + 3 * LINEAR
    method.caches_targets = True
    assert operations(method, SIDE) == 2 * CONV + 3 * LINEAR


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_attention_is_counted_and_what_is_computed_again_is_not(
    activation_checkpointing: bool,
) -> None:
    method = Toy(Attention(activation_checkpointing))
    widen, last = 2 * TOKENS * 3 * 3 * WIDTH, 2 * TOKENS * WIDTH * WIDTH
    attention = 2 * 2 * TOKENS**2 * WIDTH
    assert operations(method, SIDE) == 2 * widen + 3 * attention + 3 * last
    assert method.student.activation_checkpointing is activation_checkpointing


def test_a_resnet18_costs_what_the_literature_says() -> None:
    teacher = TeacherConfig(backbone="resnet18", weights="random", layers=[4])
    cached = Stfpm(StfpmConfig(teacher=teacher, cache_teacher=True), 0)
    # 1.814e9 multiply-additions at 224 (He et al. 2016: 1.8e9), the classifier's 0.0005e9 left out.
    forward, first = 2 * 1.8141e9, 2 * 3 * 64 * 49 * 112**2
    assert operations(cached, 224) == pytest.approx(3 * forward - first, rel=1e-3)


def blocks(depth: int, tokens: int, dim: int, linear: int = 3) -> int:
    """A transformer's blocks (He et al. 2022: MLP ratio 4), forward and backward.

    Args:
        linear: how often a linear layer costs its forward.
    """
    return depth * (linear * 24 * tokens * dim**2 + 3 * 4 * tokens**2 * dim)


def adapters(depth: int, tokens: int, dim: int, rank: int = 4) -> int:
    """LoRA of qkv and of the projection, trained."""
    return depth * 3 * 2 * tokens * rank * ((dim + 3 * dim) + (dim + dim))


VISIBLE, HIDDEN, VALUES, DIM, DECODER = 4, 12, 3 * 8**2, 192, 128
"""Of mae_vit_tiny_patch8 at 32 with three quarters hidden."""
OUTSIDE = 2 * 2 * VISIBLE * VALUES * DIM + 3 * (
    2 * (VISIBLE + 1) * DIM * DECODER + 2 * HIDDEN * DECODER * VALUES
)
"""Embedding of the patches (whose pixels need no gradient), of the decoder, and the prediction."""


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_masked_autoencoder_costs_what_its_visible_and_hidden_patches_do(
    activation_checkpointing: bool,
) -> None:
    config = LoraMaeConfig(
        preset="mae_vit_tiny_patch8",
        weights="random",
        lora=None,
        freeze_non_lora=False,
        activation_checkpointing=activation_checkpointing,
    )
    counted = operations(LoraMae(config, 32, 0), 32)
    assert counted == OUTSIDE + blocks(6, 5, DIM) + blocks(2, 17, DECODER)


def test_frozen_blocks_cost_two_thirds_and_their_adapters_little() -> None:
    config = LoraMaeConfig(preset="mae_vit_tiny_patch8", weights="random", freeze_random=True)
    counted = operations(LoraMae(config, 32, 0), 32)
    frozen = blocks(6, 5, DIM, linear=2) + blocks(2, 17, DECODER, linear=2)
    assert counted == OUTSIDE + frozen + adapters(6, 5, DIM) + adapters(2, 17, DECODER)


def test_counting_changes_neither_the_method_nor_a_random_generator() -> None:
    method = Toy(nn.Sequential(network(), nn.Dropout(0.5)), teacher=True).eval()
    before = copy.deepcopy(method.state_dict())
    state = torch.get_rng_state()
    operations(method, SIDE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in method.parameters())
    assert not method.training


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "no", 156e12),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA GeForce RTX 3090", "bf16", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("Something New", "bf16", None),
    ],
)
def test_the_peak_is_known_of_known_gpus_only(name, precision, expected) -> None:
    assert peak(name, precision) == expected
