"""Dropout that depends on the image and on nothing beside it.

torch's own is drawn for a batch as a whole, so that a training would be another on another number
of processes. Here the values of an image are dropped by the image's own seed. It is kept in the
layers and not in a context: activation checkpointing comes back for it in the backward pass, which
autograd may run in another thread.
"""

import math
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from kdad_dist.draws import hashes

STREAM = 1 << 16
"""Of the draws, for a network's first dropout; further ones have the streams that follow."""
STEPS = 1 << 16
"""A hash is taken for four numbers of 16 bits: rates are multiples of 1/65536."""


class RowDropout(nn.Module):
    """Drops values while training, as `drop_by` says, and scales the others to keep the mean.

    Args:
        rate: of the values that are dropped, from 0 to below 1.
        whole: all values of an image or none: a residual branch (stochastic depth).
    """

    def __init__(self, rate: float, whole: bool = False) -> None:
        super().__init__()
        self.rate, self.whole = rate, whole
        self.seed: Tensor | None = None
        self.stream = 0

    def __getstate__(self) -> dict[str, Any]:
        """Of copies, which know no batch."""
        return {**vars(self), "seed": None}

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape, whose first dimension are the images."""
        dropped = min(round(self.rate * STEPS), STEPS - 1)
        if not self.training or dropped == 0:
            return values
        assert self.seed is not None, "drop_by was not called"
        assert len(values) <= len(self.seed), "there are several rows of values for each image"
        shape = (len(values), *[1] * (values.dim() - 1)) if self.whole else values.shape
        count = math.prod(shape[1:])
        numbers = hashes(self.seed[: len(values)], -(-count // 4), self.stream).view(torch.int16)
        drop = numbers[:, :count].reshape(shape) < dropped - STEPS // 2
        return values.masked_fill(drop, 0) * (STEPS / (STEPS - dropped))


def drop_by(network: nn.Module, seed: Int64[Tensor, " b"]) -> None:
    """Has every `RowDropout` of the network drop by the seeds of the images that follow."""
    if len(seed) == 0:  # networks take a blank image in the place of none
        seed = seed.new_zeros(1)
    layers = (module for module in network.modules() if isinstance(module, RowDropout))
    for stream, layer in enumerate(layers, STREAM):
        layer.seed, layer.stream = seed, stream
