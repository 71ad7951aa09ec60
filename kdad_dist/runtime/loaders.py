"""The loaders that a configuration asks for, for one process of a launch."""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.config.data import AugmentConfig, DataConfig
from kdad_dist.config.run import RunConfig
from kdad_dist.data.augment import Augment, augment
from kdad_dist.data.cache import cache_root
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.loader import IndexedLoader, Loader
from kdad_dist.data.pixels import Pixels, open_pixels, pixel_key, stacked, to_float
from kdad_dist.data.plan import Plan, Rows, StreamPlan, by_shard
from kdad_dist.data.reader import ShardReader, check_size
from kdad_dist.data.stream import StreamLoader
from kdad_dist.data.targets import TargetCache, fill_targets
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.methods.base import Method
from kdad_dist.runtime.identity import shown_hash
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.session import Session
from kdad_dist.types import Features, Poll

log = logging.getLogger(__name__)
UNIT = 16
"""Images per pass when a teacher's features are computed once; a fixed number, so that the
features do not depend on the run's batch size."""


def open_loaders(
    config: RunConfig, index: Index, method: Method, here: Session, poll: Poll
) -> tuple[Loader, Loader | None]:
    """The loaders of the training images and of the held-out ones (None: nothing is held out).

    Held-out images are not augmented: they are read as scoring reads them.

    Args:
        poll: called often while caches are filled, here or by another process.

    Raises:
        DataError: there is no training image at all.
        ConfigError: a teacher's features are to be cached of images that change or are streamed.
    """
    train, held_out = choose(config, index, method)
    log.info("%d training images, %d held out for validation", len(train), len(held_out))
    if (tiles := config.data.tiling.count) > 1:
        log.info("each is cut into %d tiles of %d pixels", tiles, config.data.network_size)
    if (crop := config.data.augment.crop_margin) and not config.data.centre_margin:
        log.info(
            "training images are seen %.3g times as large as held-out, test and new ones; "
            "data.centre_margin=%d would show them alike",
            1 + crop / config.data.image_size,
            crop,
        )
    opener = open_stream if config.data.access == "stream" else open_indexed
    return (
        opener(config, index, train, config.data.augment, method, here, poll),
        opener(config, index, held_out, AugmentConfig(), method, here, poll) if held_out else None,
    )


def choose(config: RunConfig, index: Index, method: Method) -> tuple[list[Sample], list[Sample]]:
    """The training images and the held-out ones, which may be none.

    Raises:
        DataError: there is no training image at all.
        ConfigError: as `check`.
    """
    data = config.data
    check(config, method)
    train, held_out = (
        index.select(split, data.category, data.normal_class, data.val_fraction, data.classes)
        for split in (Split.TRAIN, Split.VAL)
    )
    if data.classes:
        refuse_empty(data.classes, train, data.shards)
    if not train and data.normal_class:
        held = {s.class_name for s in index.samples if s.split is Split.TRAIN and s.class_name}
        raise DataError(
            f"{data.shards} holds no training image of the class {data.normal_class}",
            f"choose one that has some: {', '.join(sorted(held)) or 'there is none'}",
        )
    if not train:
        raise DataError(
            f"{data.shards} holds no normal training image of category {data.category}",
            "pack a folder with train/good, or choose another data.category",
        )
    refuse_idle_student(config, train)
    return train, held_out


def refuse_idle_student(config: RunConfig, samples: Sequence[Sample]) -> None:
    """Refuses a training that ends before it is the student's turn."""
    method, epochs = config.method, config.train.epochs
    if not isinstance(method, ClasskdConfig) or method.distill != "discriminator":
        return
    steps = config.train.steps
    if steps is None:
        steps = (epochs or 0) * indexed_plan(config, samples, rank=0, world=1).steps_per_epoch
    first = method.turns.discriminator
    if steps <= first:
        raise ConfigError(
            f"the student would never be trained: the discriminator has the first {first} steps "
            f"(method.turns.discriminator) of {steps} in all",
            "train longer (train.epochs, train.steps), with a smaller train.batch_size, or set a "
            "smaller method.turns.discriminator (and method.turns.period)",
        )


def refuse_empty(classes: Sequence[str], train: Sequence[Sample], shards: str) -> None:
    """Refuses classes of which there is nothing to learn from."""
    held = {sample.class_name for sample in train}
    if empty := [name for name in classes if name not in held]:
        there = ", ".join(name for name in classes if name in held) or "there is none"
        raise DataError(
            f"{shards} holds no training image of {', '.join(empty)}",
            f"leave out of data.classes what has none; these have some: {there}",
        )


def labels_of(config: RunConfig, samples: Sequence[Sample]) -> NDArray[np.int64] | None:
    """The labels that a method learns from; None where it learns from images alone."""
    if config.data.classes is None:
        return None
    return np.array([sample.gt_label for sample in samples], dtype=np.int64)


def indexed_plan(config: RunConfig, samples: Sequence[Sample], rank: int, world: int) -> Plan:
    """What a process reads of samples at random access."""
    train = config.train
    return Plan(
        len(samples) * config.data.tiling.count,
        batch_size=train.batch_size,
        seed=config.seed,
        rank=rank,
        world=world,
        micro_batch_size=train.micro_batch_size,
    )


def stream_plan(config: RunConfig, samples: Sequence[Sample], rank: int, world: int) -> StreamPlan:
    """What a process reads of samples shard by shard."""
    train = config.train
    return StreamPlan(
        tuple(by_shard([sample.shard for sample in samples]).values()),
        batch_size=train.batch_size,
        seed=config.seed,
        rank=rank,
        world=world,
        micro_batch_size=train.micro_batch_size,
    )


def check(config: RunConfig, method: Method) -> None:
    """Refuses what the keys below `data` do not allow together."""
    data = config.data
    if data.access == "stream" and method.caches_targets:
        raise ConfigError(
            "method.cache_teacher needs images at random access, and data.access is stream",
            "set data.access=indexed or method.cache_teacher=false",
        )
    if data.augment != AugmentConfig() and method.caches_targets:
        raise ConfigError(
            "method.cache_teacher keeps the teacher's features of each image as it was packed, and "
            "data.augment changes the images in every epoch",
            "set method.cache_teacher=false, or leave out data.augment",
        )


def check_shards(config: RunConfig, index: Index) -> None:
    """Refuses shards that hold other categories, or smaller images, than the configuration wants:
    before its networks are built, whose weights may be far away.
    """
    data, crop = config.data, config.data.augment.crop_margin
    index.chosen(data.category)
    if crop:
        check_size(index.image_size, data.image_size, crop, "data.augment.crop_margin")
    check_size(index.image_size, data.image_size, data.centre_margin, "data.centre_margin")


def read_as(data: DataConfig, changes: AugmentConfig) -> tuple[int, int]:
    """The side of images as they are read, and the margin that was cut from around them: none where
    a window of each is chosen at random later.
    """
    if changes.crop_margin:
        return data.image_size + changes.crop_margin, 0
    return data.image_size, data.centre_margin


def augmentation(config: AugmentConfig, size: int) -> Augment | None:
    """What is done to the images of a pass; None: nothing."""
    if config == AugmentConfig():
        return None
    return partial(augment, size=size, config=config)


def open_indexed(
    config: RunConfig,
    index: Index,
    samples: Sequence[Sample],
    changes: AugmentConfig,
    method: Method,
    here: Session,
    poll: Poll,
) -> Loader:
    data, (size, margin) = config.data, read_as(config.data, changes)
    with counting("decoding", len(samples), poll) as count:
        pixels = open_pixels(
            samples, index, size, data.cache, here.device, count, data.tiling, margin
        )
    targets = None
    if method.caches_targets:
        name = pixel_key(samples, index, size, margin) + (repr(data.tiling) if data.tile else "")
        targets = cached_targets(config, name, pixels, method, here, poll)
    plan = indexed_plan(config, samples, here.rank, here.world)
    change, labels = augmentation(changes, data.network_size), labels_of(config, samples)
    return IndexedLoader(pixels, plan, here.device, targets, change, labels)


def cached_targets(
    config: RunConfig,
    pixels_name: str,
    pixels: Pixels,
    method: Method,
    here: Session,
    poll: Poll,
) -> TargetCache:
    """The teacher's features of all samples, from a file that the processes of a node share."""
    assert method.teacher is not None

    @torch.no_grad()
    def compute(rows: Rows) -> Features:
        with here.autocast():
            return method.targets(to_float(pixels.read(rows), here.device))

    teacher = shown_hash(method.teacher.state_dict(), "the teacher")
    parts = [pixels_name, teacher, repr(config.method), config.train.precision]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    with counting("teacher's features", len(pixels), poll) as count:
        return fill_targets(
            cache_root() / "targets" / name,
            compute,
            len(pixels),
            UNIT,
            f"the teacher's features of {len(pixels)} images",
            pin=here.device.type == "cuda",
            poll=count,
        )


@contextmanager
def counting(title: str, images: int, poll: Poll) -> Iterator[Poll]:
    """The same `poll`, which shows how far a cache is filled, on whichever process fills it."""
    with progress(title, images, "images", brief=True) as bar:

        def count(done: int = 0) -> None:
            poll(done)
            if done:
                bar.advance(done)

        yield count


def first_images(config: RunConfig, index: Index, method: Method, device: torch.device) -> Tensor:
    """RGB in [0, 1] of the first training images, or of a tile of each, another one of the next; as
    many as the method wants, the same on every process.
    """
    data, side = config.data, config.data.network_size
    samples, _ = choose(config, index, method)
    reader = ShardReader(data.shards, data.image_size, data.centre_margin)
    corners = itertools.cycle(data.tiling.corners)
    pixels = [
        reader.image(sample)[top : top + side, left : left + side]
        for sample, (top, left) in zip(samples[: method.wants_images], corners, strict=False)
    ]
    return stacked(pixels, device)


def open_stream(
    config: RunConfig,
    index: Index,
    samples: Sequence[Sample],
    changes: AugmentConfig,
    method: Method,
    here: Session,
    poll: Poll,
) -> Loader:
    plan = stream_plan(config, samples, here.rank, here.world)
    size, margin = read_as(config.data, changes)
    change = augmentation(changes, config.data.image_size)
    labels = labels_of(config, samples)
    return StreamLoader(samples, index, plan, size, here.device, change, poll, labels, margin)
