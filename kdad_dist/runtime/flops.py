"""What training an image costs in arithmetic, and what a GPU could do at most."""

import copy
import re
from itertools import chain

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdad_dist.methods.base import Method
from kdad_dist.types import Batch


def operations(method: Method, image_size: int) -> float:
    """Floating-point operations of forward and backward per image, teacher and student together.

    Of convolutions, matrix products and attention, a multiplication and an addition counted as two.
    Frozen weights cost less, since no gradient of them is computed, and a teacher whose output is
    cached costs nothing. What activation checkpointing computes again is not counted.

    Nothing is computed: a copy without data does it on torch's meta device.
    """
    twin = without_data(method, "meta").train()
    for module in twin.modules():
        if "activation_checkpointing" in vars(module):
            vars(module)["activation_checkpointing"] = False
    with torch.device("meta"):
        # Two, since a BatchNorm that sees 1x1 refuses a single one.
        image = torch.empty(2, 3, image_size, image_size)
        number = torch.zeros(2, dtype=torch.int64)
    targets = twin.targets(image) if twin.caches_targets else None
    with FlopCounterMode(display=False) as counter:
        twin(Batch(image, number, number, targets, number))["loss"].sum().backward()
    return counter.get_total_flops() / len(image)


def without_data(method: Method, device: str) -> Method:
    """A copy on another device, made without copying a weight: on "meta", or among fake tensors,
    it takes no memory.
    """
    twins: dict[int, object] = {}
    for tensor in chain(method.parameters(), method.buffers()):
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, tensor.requires_grad)
        twins[id(tensor)] = twin
    return copy.deepcopy(method, twins)


def _cores(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "no": single}


PEAKS = {
    "B200": _cores(2250, 1125),
    "GH200": _cores(989.4, 494.7),
    "H200": _cores(989.4, 494.7),
    "H100": _cores(989.4, 494.7),
    "H100 PCIe": _cores(756, 378),
    "A100-SXM4": _cores(312, 156),
    "A100-PCIE": _cores(312, 156),
    "A100": _cores(312, 156),
    "A10": _cores(125, 62.5),
    "L40S": _cores(362, 183),
    "L4": _cores(121, 60),
    "V100-SXM2": {"fp16": 125, "no": 15.7},
    "V100-PCIE": {"fp16": 112, "no": 14.0},
    "T4": {"fp16": 65, "no": 8.1},
    "RTX 4090": _cores(165.2, 82.6),
    "RTX 3090": _cores(71, 35.6),
}
"""1e12 operations per second by model and `train.precision`, from the makers' data sheets: tensor
cores, dense matrices, sums in float32. "no" is TF32 where the GPU has it (torch computes
convolutions in it), else float32."""


def peak(gpu: str, precision: str) -> float | None:
    """Operations per second that a GPU of this name can do at most; None where that is not known.

    Args:
        gpu: as torch names it, such as "NVIDIA A100-SXM4-80GB".
    """
    if " MIG " in gpu:  # a slice, of one size or another
        return None
    model = re.sub(r"^(NVIDIA |Tesla |GeForce )+|[- ]\d+GB.*$", "", gpu)
    rate = PEAKS.get(model, {}).get(precision)
    return None if rate is None else rate * 1e12
