"""Methods at their smallest, as modules; tests/tiny.py has them as configurations."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdad_dist.config.methods import (
    MkdConfig,
    MkdTeacherConfig,
    StfpmConfig,
    TeacherConfig,
    VitkdConfig,
    VitStudentConfig,
    VitTeacherConfig,
)
from kdad_dist.draws import seeded
from kdad_dist.methods.base import Method
from kdad_dist.methods.mkd import Mkd
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.methods.vitkd import Vitkd
from kdad_dist.models.weights import tensors_hash
from kdad_dist.types import Batch


def make_stfpm(
    backbone: str = "test_resnet", layers: tuple[int, ...] = (1, 2), **options: Any
) -> Stfpm:
    torch.set_num_threads(1)
    teacher = TeacherConfig(backbone, "random", list(layers))
    return Stfpm(StfpmConfig(teacher=teacher, **options), seed=0)


def make_mkd(
    backbone: str = "test_resnet",
    layers: tuple[int, ...] = (1, 2, 3),
    size: int = 32,
    **options: Any,
) -> Mkd:
    torch.set_num_threads(1)
    teacher = MkdTeacherConfig(backbone, "random", list(layers))
    noise = {"noise_copies": 3} if options.get("localise") == "smoothgrad" else {}
    return Mkd(MkdConfig(teacher=teacher, **{"pool": False, **noise, **options}), size, 0)


def make_vitkd(
    backbone: object = "test_vit",
    layers: tuple[int, ...] = (2, 4),
    size: int = 32,
    weights: str = "random",
    heads: int = 4,
    **options: Any,
) -> Vitkd:
    torch.set_num_threads(1)
    teacher = VitTeacherConfig(str(backbone), weights, list(layers))
    student = VitStudentConfig(heads=heads, mlp=16)
    return Vitkd(VitkdConfig(teacher=teacher, student=student, **options), size, seed=0)


STUDENTS: dict[str, Callable[..., Method]] = {
    "stfpm": make_stfpm,
    "stfpm of a transformer": partial(make_stfpm, "test_vit"),
    "mkd, small": make_mkd,
    "mkd, equal": partial(make_mkd, student="equal"),
    "mkd, same": partial(make_mkd, student="same"),
    "vitkd": make_vitkd,
}
"""Methods that learn the features of a teacher, and the forms of their students."""


def batch(count: int, seed: int = 0) -> Batch:
    image = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    row = torch.arange(count)
    return Batch(image.contiguous(memory_format=torch.channels_last), row, row)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the module's parameters and saved buffers."""
    return tensors_hash(module.state_dict())


def gradients(method: Method, losses: dict[str, Tensor]) -> list[Tensor | None]:
    """Of every weight of the student."""
    method.zero_grad()
    losses["loss"].sum().backward()
    return [p.grad for p in method.student.parameters()]


def make_hub_vit(folder: Path, size: int = 32, depth: int = 4, classes: bool = False) -> Path:
    """A tiny ViT in the hub's form, with or without the head of a classifier."""
    import transformers

    settings = transformers.ViTConfig(
        image_size=size,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=48,
    )
    network = transformers.ViTForImageClassification if classes else transformers.ViTModel
    with seeded(3, "hub"):
        network(settings).save_pretrained(folder)
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return folder
