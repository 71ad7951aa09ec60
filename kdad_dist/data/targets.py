"""What a frozen teacher says of each training image: computed once per node, read every epoch."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdad_dist.data.cache import filled_array
from kdad_dist.data.pixels import take
from kdad_dist.data.plan import Rows
from kdad_dist.types import Features, Poll, go_on


class TargetCache:
    """Feature maps of all samples in a memory-mapped file that the processes of a node share."""

    def __init__(self, layers: list[NDArray], dtype: torch.dtype, pin: bool) -> None:
        self._layers = layers
        self._dtype = dtype
        self._pin = pin

    def __len__(self) -> int:
        return len(self._layers[0])

    def read(self, rows: Rows) -> Features:
        """The feature maps of these samples, (b, c, h, w) in channels_last memory, on the host."""
        return tuple(
            take(layer, rows, self._pin).view(self._dtype).permute(0, 3, 1, 2)
            for layer in self._layers
        )


def fill_targets(
    path: Path,
    compute: Callable[[Rows], Features],
    count: int,
    unit: int,
    description: str,
    pin: bool = False,
    poll: Poll = go_on,
) -> TargetCache:
    """The outputs of `compute` for samples 0 to `count` - 1, in the type that it gives them.

    The size is logged before anything is computed. `path` must name everything that decides the
    values: the weights, the layers, the precision and the samples.

    Args:
        compute: (b, c, h, w) maps of some samples, one tensor per layer, on any device. Called
            once with a single sample to learn their shapes, and by one process per node with
            `unit` samples at a time.
        pin: whether reading gives page-locked memory, for copies to a GPU.

    Raises:
        DataError: the cache has no room.
    """
    probe = compute(np.zeros(1, dtype=np.int64))
    dtype = probe[0].dtype
    # numpy has no bfloat16: its bits are kept as integers.
    stored = torch.int16 if dtype == torch.bfloat16 else dtype
    shapes = [(count, *layer.shape[2:], layer.shape[1]) for layer in probe]

    def fill(flat: NDArray) -> None:
        layers = split(flat, shapes)
        for start in range(0, count, unit):
            rows = np.arange(start, min(start + unit, count))
            for layer, maps in zip(layers, compute(rows), strict=True):
                maps = maps.detach().permute(0, 2, 3, 1).contiguous().view(stored)
                layer[rows[0] : rows[-1] + 1] = maps.cpu().numpy()
            poll(done=len(rows))

    numpy_dtype = torch.empty(0, dtype=stored).numpy().dtype
    size = sum(math.prod(shape) for shape in shapes)
    flat = filled_array(path, (size,), numpy_dtype, fill, description, poll)
    return TargetCache(split(flat, shapes), dtype, pin)


def split(flat: NDArray, shapes: list[tuple[int, ...]]) -> list[NDArray]:
    """Consecutive parts of a flat array, each in its shape."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]
