"""Batches in the order of a plan: read ahead of use, converted and augmented on the device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from kdad_dist.data.augment import Augment
from kdad_dist.data.pixels import Pixels, sent
from kdad_dist.data.plan import EpochPlan, MicroBatch, Plan, Rows
from kdad_dist.data.threads import in_advance
from kdad_dist.types import Batch, Features

AHEAD = 2
"""Steps that are read before they are asked for, by a thread each."""


class Micro(NamedTuple):
    """What one process contributes to one forward pass of all processes."""

    batch: Batch
    step_images: int
    """Images of the whole step over all processes."""


class Targets(Protocol):
    """Cached output of a teacher by position in the list of samples."""

    def read(self, rows: Rows) -> Features: ...


class Loader(ABC):
    """The batches of one process, by a plan."""

    def __init__(
        self,
        plan: EpochPlan,
        device: torch.device,
        augment: Augment | None,
        labels: NDArray[np.int64] | None,
    ) -> None:
        """Args:
        labels: of all samples, where the method learns from them.
        """
        self._plan = plan
        self._device = numbered(device)
        self._augment = augment
        self._labels = labels

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    def samples_seen(self, step: int) -> int:
        """Images of all processes in the first `step` steps."""
        return self._plan.samples_seen(step)

    @abstractmethod
    def steps(self, start: int, stop: int) -> Iterator[list[Micro]]:
        """The passes of each step from `start` to `stop` - 1; later steps are read meanwhile."""

    def _micro(
        self, part: MicroBatch, image: Float[Tensor, "b 3 s s"], targets: Features | None = None
    ) -> Micro:
        """The images of a pass, augmented, with their rows and seeds, all on the device."""
        labels = [] if self._labels is None else [self._labels[part.rows]]
        row, seed, *label = sent(np.stack([part.rows, part.seeds, *labels]), self._device)
        if self._augment:
            image = self._augment(image, seed)
        return Micro(Batch(image, row, seed, targets, *label), part.step_images)


class IndexedLoader(Loader):
    """From pixels at random access."""

    def __init__(
        self,
        pixels: Pixels,
        plan: Plan,
        device: torch.device,
        targets: Targets | None = None,
        augment: Augment | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        assert len(pixels) == plan.images, (len(pixels), plan.images)
        super().__init__(plan, device, augment, labels)
        self._pixels = pixels
        self._targets = targets

    def steps(self, start: int, stop: int) -> Iterator[list[Micro]]:
        calls = (partial(self._read, parts) for parts in self._plan.steps(start, stop))
        with closing(in_advance(calls, AHEAD, AHEAD, self._device)) as steps:
            yield from steps

    def _read(self, parts: list[MicroBatch]) -> list[Micro]:
        return [self._pass(part) for part in parts]

    def _pass(self, part: MicroBatch) -> Micro:
        image = self._pixels.floats(part.rows, self._device)
        targets = self._targets.read(part.rows) if self._targets else None
        if targets is not None:
            targets = tuple(layer.to(self._device, non_blocking=True) for layer in targets)
        return self._micro(part, image, targets)


def numbered(device: torch.device) -> torch.device:
    """The device with its index: "cuda" means another one in another thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
