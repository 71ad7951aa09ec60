"""How much memory a training takes: what is known before it starts, and what it came to."""

import resource
from collections.abc import Iterable

import torch
from torch import Tensor

from kdad_dist.config import RunConfig
from kdad_dist.methods.base import Method

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def expected(config: RunConfig, method: Method, images: int) -> str:
    """What each process will hold, but for activations, and how large the decoded pixels are.

    Args:
        images: of the training split.
    """
    weights = size(method.parameters()) + size(method.buffers())
    trained = size(p for p in method.parameters() if p.requires_grad)
    text = (
        f"memory of a process, beside activations: weights {readable(weights)} "
        f"({readable(trained)} of them trained), gradients {readable(trained)}, "
        f"optimizer {readable(moments(config) * trained)}"
    )
    data = config.data
    if data.access == "stream" or data.cache == "none":
        return text
    pixels = 3 * images * (data.image_size + data.augment.crop_margin) ** 2
    place = "on each device" if data.cache == "device" else "shared by the processes of a node"
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


def readable(count: float) -> str:
    """17 B, 1.5 KiB, 243 MiB."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} {UNITS[-1]}"
