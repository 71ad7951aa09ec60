"""How much memory a training takes: what is known before it starts, and what it came to."""

import resource
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdad_dist.config.run import RunConfig
from kdad_dist.methods.base import Method
from kdad_dist.wording import readable

SHARDED = {
    "ddp": (),
    "fsdp2": ("weights", "gradients", "optimizer"),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
}
"""What each mode divides among the processes, instead of each holding all of it."""

BUCKET = 50_000_000
"""Numbers of a bucket in which DeepSpeed's gradients travel, as launch/deepspeed/ says."""
KEPT = 1_000_000_000
"""Numbers of gathered weights that ZeRO-3 keeps until they are used again."""
AROUND_A_TENSOR = 1800
"""Bytes that torch's checkpoint format adds to each tensor: a header and its entry of the index."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a process holds from one step to the next."""

    teacher: int
    weights: int
    """Of the student, frozen ones and buffers too."""
    gradients: int
    optimizer: int
    exchange: int
    """What gradients travel in, or what is gathered of weights that are divided."""

    @property
    def total(self) -> int:
        return self.teacher + self.weights + self.gradients + self.optimizer + self.exchange


def memory(config: RunConfig, method: Method, mode: str, world: int) -> Memory:
    """What each of so many processes will hold in a mode, beside activations."""
    student, trained = method.student, trained_bytes(method)
    parameters = size(student.parameters())
    held = {"weights": parameters, "gradients": trained, "optimizer": state_bytes(config, method)}
    parts = {name: held[name] // (world if name in SHARDED[mode] else 1) for name in held}
    if mode.startswith("zero"):  # DeepSpeed updates a copy of its part of the weights
        parts["optimizer"] += trained // world
    parts["weights"] += size(student.buffers())
    return Memory(
        # The method's own buffers lie on the device too.
        teacher=size(method.parameters())
        + size(method.buffers())
        - parameters
        - size(student.buffers()),
        exchange=exchange(method, mode, world),
        **parts,
    )


def exchange(method: Method, mode: str, world: int) -> int:
    """Room for what travels, in float32.

    DDP's buckets are as large as the gradients, DeepSpeed's as its configuration says (two of them
    in stages 1 and 2). Where weights are divided, FSDP2 has those outside of blocks and two blocks
    (one in use, one on its way) whole, ZeRO-3 as many as it may.
    """
    parameters = size(method.student.parameters())
    match mode:
        case "ddp":
            return trained_bytes(method) if world > 1 else 0
        case "zero1" | "zero2":
            return 2 * 4 * BUCKET
        case "zero3":
            return 4 * BUCKET + min(parameters, 4 * KEPT)
    blocks = [
        size(module.parameters())
        for module in method.student.modules()
        if type(module).__name__ in method.blocks
    ]
    return parameters - sum(blocks) + sum(sorted(blocks)[-2:])


def trained_bytes(method: Method) -> int:
    return size(p for p in method.student.parameters() if p.requires_grad)


def state_bytes(config: RunConfig, method: Method) -> int:
    """Of the optimizer: its moments, and Adam's count of steps for each parameter."""
    counts = 0 if config.optim.name == "sgd" else len(trained_tensors(method))
    return moments(config) * trained_bytes(method) + 4 * counts


def trained_tensors(method: Method) -> list[Tensor]:
    return [p for p in method.student.parameters() if p.requires_grad]


def checkpoint_bytes(config: RunConfig, method: Method) -> int:
    """Of one checkpoint: what is trained, the student's buffers, the optimizer's state."""
    student = method.student
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    saved = [value for name, value in student.state_dict().items() if name not in frozen]
    per_parameter = moments(config) + (config.optim.name != "sgd")
    tensors = len(saved) + per_parameter * len(trained_tensors(method))
    return size(saved) + state_bytes(config, method) + tensors * AROUND_A_TENSOR


def pixel_bytes(config: RunConfig, images: int) -> int:
    """Of the decoded training images; 0 where none are kept."""
    data = config.data
    if data.access == "stream" or data.cache == "none":
        return 0
    return 3 * images * (data.image_size + data.augment.crop_margin) ** 2


def expected(config: RunConfig, method: Method, images: int, mode: str, world: int) -> str:
    """What each process will hold, but for activations, and how large the decoded pixels are.

    Args:
        images: of the training split.
    """
    held = memory(config, method, mode, world)
    trained = trained_bytes(method) // (world if "weights" in SHARDED[mode] else 1)
    text = (
        "memory of a process, beside activations: weights "
        f"{readable(held.teacher + held.weights)} ({readable(trained)} of them trained), "
        f"gradients {readable(held.gradients)}, optimizer {readable(held.optimizer)}"
    )
    if held.exchange:
        text += f", exchange with others {readable(held.exchange)}"
    pixels = pixel_bytes(config, images)
    if not pixels:
        return text
    place = (
        "on each device" if config.data.cache == "device" else "shared by the processes of a node"
    )
    return f"{text}; pixels of {images} images {readable(pixels)}, {place}"


def moments(config: RunConfig) -> int:
    """Numbers that the optimizer keeps for each one that it trains."""
    return int(config.optim.momentum > 0) if config.optim.name == "sgd" else 2


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU so far, or this process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # which Linux gives in KiB
