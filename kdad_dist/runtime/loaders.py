"""The loaders that a configuration asks for, for one process of a launch."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kdad_dist.config import RunConfig
from kdad_dist.data.cache import cache_root
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.loader import IndexedLoader, Micro, Pixels, open_pixels, pixel_key, to_float
from kdad_dist.data.plan import Plan, Rows, StreamPlan, by_shard
from kdad_dist.data.stream import StreamLoader
from kdad_dist.data.targets import TargetCache, fill_targets
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.methods.base import Method
from kdad_dist.models.weights import weights_hash
from kdad_dist.runtime.session import Session
from kdad_dist.types import Features

log = logging.getLogger(__name__)
UNIT = 16
"""Images per pass when a teacher's features are computed once; a fixed number, so that the
features do not depend on the run's batch size."""


class Loader(Protocol):
    """What training reads from: indexed or streamed, by the same arithmetic."""

    @property
    def steps_per_epoch(self) -> int: ...

    def samples_seen(self, step: int) -> int: ...

    def steps(self, start: int, stop: int) -> Iterator[list[Micro]]: ...


def open_loaders(
    config: RunConfig, index: Index, method: Method, here: Session
) -> tuple[Loader, Loader | None]:
    """The loaders of the training images and of the held-out ones (None: nothing is held out).

    Raises:
        DataError: there is no training image at all.
        ConfigError: the teacher's features are to be cached of images that are streamed.
    """
    data = config.data
    if data.access == "stream" and method.caches_targets:
        raise ConfigError(
            "method.cache_teacher needs images at random access, and data.access is stream",
            "set data.access=indexed or method.cache_teacher=false",
        )
    train, held_out = (
        index.select(split, data.category, data.normal_class, data.val_fraction)
        for split in (Split.TRAIN, Split.VAL)
    )
    if not train:
        raise DataError(
            f"{data.shards} holds no normal training image of category {data.category}",
            "pack a folder with train/good, or choose another data.category",
        )
    log.info("%d training images, %d held out for validation", len(train), len(held_out))
    opener = open_stream if data.access == "stream" else open_indexed
    return (
        opener(config, index, train, method, here),
        opener(config, index, held_out, method, here) if held_out else None,
    )


def open_indexed(
    config: RunConfig, index: Index, samples: Sequence[Sample], method: Method, here: Session
) -> Loader:
    data, train = config.data, config.train
    pixels = open_pixels(samples, index, data.image_size, data.cache, here.device)
    targets = None
    if method.caches_targets:
        name = pixel_key(samples, index, data.image_size)
        targets = cached_targets(config, name, pixels, method, here)
    plan = Plan(
        len(samples), train.batch_size, config.seed, here.rank, here.world, train.micro_batch_size
    )
    return IndexedLoader(pixels, plan, here.device, targets)


def cached_targets(
    config: RunConfig, pixels_name: str, pixels: Pixels, method: Method, here: Session
) -> TargetCache:
    """The teacher's features of all samples, from a file that the processes of a node share."""
    assert method.teacher is not None

    @torch.no_grad()
    def compute(rows: Rows) -> Features:
        with here.accelerator.autocast():
            return method.targets(to_float(pixels.read(rows), here.device))

    parts = [pixels_name, weights_hash(method.teacher), repr(config.method), config.train.precision]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return fill_targets(
        cache_root() / "targets" / name,
        compute,
        len(pixels),
        UNIT,
        f"the teacher's features of {len(pixels)} images",
        pin=here.device.type == "cuda",
    )


def open_stream(
    config: RunConfig, index: Index, samples: Sequence[Sample], method: Method, here: Session
) -> Loader:
    data, train = config.data, config.train
    plan = StreamPlan(
        tuple(by_shard([sample.shard for sample in samples]).values()),
        train.batch_size,
        config.seed,
        here.rank,
        here.world,
        train.micro_batch_size,
    )
    return StreamLoader(samples, index, plan, data.image_size, here.device)
