"""Augmentation: drawn from (seed, epoch, image), inside its limits, of training images only."""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from kdad_dist.config.data import AugmentConfig
from kdad_dist.config.run import RunConfig
from kdad_dist.data.augment import augment
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.loader import IndexedLoader, Loader
from kdad_dist.data.pixels import open_pixels
from kdad_dist.data.plan import Plan, StreamPlan, by_shard, seeds
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.stream import StreamLoader
from kdad_dist.errors import ConfigError
from kdad_dist.methods import build_method
from kdad_dist.runtime import session
from kdad_dist.runtime.loaders import check_shards, open_loaders
from tests.shards import make_shards

ALL = AugmentConfig(crop_margin=4, brightness=0.3, saturation=0.5, flip=True)
EACH = [
    AugmentConfig(crop_margin=4),
    AugmentConfig(brightness=0.3),
    AugmentConfig(saturation=0.5),
    AugmentConfig(flip=True),
]
POLL = int  # any callable will do: nobody asks to stop
SIZE = 12
CPU = torch.device("cpu")


def images(count: int, margin: int = 4, low: float = 0.0, high: float = 1.0) -> Tensor:
    shape = (count, 3, SIZE + margin, SIZE + margin)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return (low + (high - low) * drawn).to(memory_format=torch.channels_last)


def seeds_of(count: int, epoch: int = 0) -> Tensor:
    return torch.from_numpy(seeds(np.arange(count), 0, epoch))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("KDAD_CACHE", str(tmp_path / "cache"))
    return make_shards(tmp_path / "shards", train=20)


def run_config(index: Index, augmented: dict[str, Any], **more: Any) -> RunConfig:
    data = {"shards": index.root, "image_size": SIZE, "val_fraction": 0.3, "augment": augmented}
    teacher = {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]}
    values = {
        "name": "tiny",
        "data": data | more.pop("data", {}),
        "method": {"name": "stfpm", "teacher": teacher, **more},
        "optim": {"lr": 0.1},
        "train": {"epochs": 1, "batch_size": 5},
    }
    return TypeAdapter(RunConfig).validate_python(values)


def loader(index: Index, access: str, config: AugmentConfig, **plan: int) -> Loader:
    samples = index.select(Split.TRAIN, val_fraction=0)
    change = partial(augment, size=SIZE, config=config)
    share: dict[str, Any] = {"batch_size": 6, **plan}
    if access == "stream":
        shards = tuple(by_shard([sample.shard for sample in samples]).values())
        return StreamLoader(samples, index, StreamPlan(shards, **share), 16, CPU, change)
    pixels = open_pixels(samples, index, 16, access, CPU)
    return IndexedLoader(pixels, Plan(len(samples), **share), CPU, augment=change)


def as_scored(reader: ShardReader, sample: Sample) -> Tensor:
    """The image as scoring reads it, in [0, 1]."""
    return torch.tensor(reader.image(sample)).permute(2, 0, 1) / 255


def by_row(steps: list, epoch_steps: int) -> dict[tuple[int, int], bytes]:
    """The pixels of each row in each epoch."""
    return {
        (step // epoch_steps, int(row)): image.numpy().tobytes()
        for step, micros in enumerate(steps)
        for micro in micros
        for row, image in zip(micro.batch.row, micro.batch.image, strict=True)
    }


@pytest.mark.parametrize("config", [ALL, *EACH])
def test_what_an_image_becomes_does_not_depend_on_its_batch(config: AugmentConfig):
    margin = config.crop_margin
    image, seed = images(37, margin), seeds_of(37)
    together = augment(image, seed, SIZE, config)
    assert together.shape == (37, 3, SIZE, SIZE)
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(together, image[..., :SIZE, :SIZE])
    alone = [augment(image[i : i + 1], seed[i : i + 1], SIZE, config) for i in range(37)]
    assert torch.equal(together, torch.cat(alone))
    shuffled = torch.randperm(37, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(augment(image[shuffled], seed[shuffled], SIZE, config), together[shuffled])
    planar = augment(image.contiguous(), seed, SIZE, config)
    assert torch.equal(planar, together)


def test_the_images_given_are_left_as_they_were():
    for config in (ALL, *EACH):
        image = images(5, config.crop_margin)
        before = image.clone()
        augment(image, seeds_of(5), SIZE, config)
        assert torch.equal(image, before)


def test_without_options_nothing_is_computed():
    image = images(5, margin=0)
    assert augment(image, seeds_of(5), SIZE, AugmentConfig()) is image


def test_a_process_without_rows_augments_nothing():
    assert augment(images(0), seeds_of(0), SIZE, ALL).shape == (0, 3, SIZE, SIZE)


def test_every_window_is_reached_equally_often_and_lies_inside():
    side, count = SIZE + 4, 5000
    pixel = torch.arange(side * side).float().view(1, 1, side, side)
    image = pixel.expand(count, 3, side, side)
    cut = augment(image, seeds_of(count), SIZE, AugmentConfig(crop_margin=4))
    corner = cut[:, 0, 0, 0].long()
    wanted = corner[:, None, None] + pixel[0, 0, :SIZE, :SIZE].long()
    assert torch.equal(cut, wanted[:, None].expand_as(cut).float())  # a whole window of the image
    found = Counter((c // side, c % side) for c in corner.tolist())
    assert found.keys() == {(row, column) for row in range(5) for column in range(5)}
    assert all(abs(times - count / 25) < 5 * (count / 25) ** 0.5 for times in found.values())


def test_brightness_multiplies_by_factors_that_fill_the_range():
    image = images(2000, 0, 0.1, 0.5)
    factor = augment(image, seeds_of(2000), SIZE, AugmentConfig(brightness=0.3)) / image
    each = factor.amax((1, 2, 3))
    assert torch.allclose(factor, each[:, None, None, None].expand_as(factor), rtol=1e-5)
    assert 0.7 <= each.min() < 0.701 and 1.299 < each.max() < 1.3 + 1e-6
    assert abs(each.mean() - 1) < 0.02


def test_saturation_blends_with_the_grey_picture():
    image = images(2000, 0, 0.4, 0.6)
    changed = augment(image, seeds_of(2000), SIZE, AugmentConfig(saturation=0.5))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (image * weights).sum(1, keepdim=True)
    torch.testing.assert_close((changed * weights).sum(1, keepdim=True), grey)
    factor = ((changed - grey) * (image - grey)).sum((1, 2, 3)) / (image - grey).square().sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(changed, grey + factor[:, None, None, None] * (image - grey))
    assert 0.5 - 1e-4 <= factor.min() < 0.502 and 1.498 < factor.max() < 1.5 + 1e-4
    assert abs(factor.mean() - 1) < 0.03


def test_grey_images_have_no_saturation_to_change():
    image = images(9, 0)[:, :1].expand(-1, 3, -1, -1)
    changed = augment(image, seeds_of(9), SIZE, AugmentConfig(saturation=0.9))
    torch.testing.assert_close(changed, image, rtol=0, atol=1e-6)


def test_pixels_stay_between_0_and_1():
    config = AugmentConfig(brightness=0.99, saturation=0.99)
    changed = augment(images(200, 0).round(), seeds_of(200), SIZE, config)
    assert changed.min() == 0 and changed.max() == 1


def test_half_of_the_images_are_mirrored_left_to_right():
    image = images(2000, 0)
    changed = augment(image, seeds_of(2000), SIZE, AugmentConfig(flip=True))
    kept = (changed == image).flatten(1).all(1)
    mirrored = (changed == image.flip(3)).flatten(1).all(1)
    assert torch.equal(kept, ~mirrored)
    assert 900 < mirrored.sum() < 1100


def test_options_draw_independently_of_each_other():
    image = images(400)
    steps = replace(ALL, brightness=0, saturation=0, flip=False), replace(ALL, crop_margin=0)
    cut = augment(image, seeds_of(400), SIZE, steps[0])
    assert torch.equal(
        augment(cut, seeds_of(400), SIZE, steps[1]), augment(image, seeds_of(400), SIZE, ALL)
    )


def test_epochs_and_images_are_augmented_differently():
    image = images(1).expand(50, -1, -1, -1)
    first, second = (augment(image, seeds_of(50, epoch), SIZE, ALL) for epoch in range(2))
    assert len({each.numpy().tobytes() for each in [*first, *second]}) == 100


@pytest.mark.parametrize("access", ["ram", "device", "none", "stream"])
def test_a_row_has_the_same_pixels_on_any_number_of_processes(index: Index, access: str):
    alone = loader(index, access, ALL)
    epoch = alone.steps_per_epoch
    wanted = by_row(list(alone.steps(0, 2 * epoch)), epoch)
    assert len(wanted) == 40 and len(set(wanted.values())) == 40
    if access != "ram":
        assert wanted == by_row(list(loader(index, "ram", ALL).steps(0, 2 * epoch)), epoch)
    for world, micro in ((1, 4), (2, 2), (3, 1)):
        found: dict[tuple[int, int], bytes] = {}
        for rank in range(world):
            share = {"rank": rank, "world": world, "micro_batch_size": micro}
            steps = list(loader(index, access, ALL, **share).steps(0, 2 * epoch))
            found |= by_row(steps, epoch)
        assert found == wanted


@pytest.mark.parametrize("access", ["ram", "stream"])
def test_a_resumed_training_sees_the_same_pixels(index: Index, access: str):
    whole = list(loader(index, access, ALL).steps(0, 8))
    for before, after in zip(whole[3:], loader(index, access, ALL).steps(3, 8), strict=True):
        assert torch.equal(before[0].batch.image, after[0].batch.image)
        assert torch.equal(before[0].batch.seed, after[0].batch.seed)


@pytest.mark.parametrize("margin", [0, 4])
@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_held_out_images_are_read_as_scoring_reads_them(
    index: Index, access: str, margin: int, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    augmented = {"crop_margin": 4, "brightness": 0.3, "saturation": 0.5, "flip": True}
    config = run_config(index, augmented, data={"access": access, "centre_margin": margin})
    with session.start() as here:
        train, held_out = open_loaders(config, index, build_method(config), here, POLL)
    assert held_out
    assert ("1.33 times as large" in caplog.text) == (margin == 0)
    samples = index.select(Split.VAL, val_fraction=0.3)
    reader = ShardReader(index.root, SIZE, margin)
    read = 0
    for (micro,) in held_out.steps(0, 2 * held_out.steps_per_epoch):
        for row, image in zip(micro.batch.row, micro.batch.image, strict=True):
            assert torch.equal(image, as_scored(reader, samples[row]))
            read += 1
    assert read == 2 * len(samples)
    epochs = (0, train.steps_per_epoch)
    first, second = (next(iter(train.steps(i, i + 1)))[0].batch for i in epochs)
    assert first.image.shape[2:] == (SIZE, SIZE) and not torch.equal(first.image, second.image)


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_without_options_training_images_are_those_that_are_scored(
    index: Index, access: str, margin: int
):
    config = run_config(index, {}, data={"access": access, "centre_margin": margin})
    with session.start() as here:
        train, _ = open_loaders(config, index, build_method(config), here, POLL)
    samples = index.select(Split.TRAIN, val_fraction=0.3)
    reader = ShardReader(index.root, SIZE, margin)
    for (micro,) in train.steps(0, train.steps_per_epoch):
        for row, image in zip(micro.batch.row, micro.batch.image, strict=True):
            assert torch.equal(image, as_scored(reader, samples[row]))


@pytest.mark.parametrize("margin", [5, 300])
def test_a_margin_beyond_the_packed_size_is_named(index: Index, margin: int):
    config = run_config(index, {"crop_margin": margin})
    with pytest.raises(ConfigError, match=f"crop_margin={margin} .*of 16") as caught:
        check_shards(config, index)
    assert f"--size {SIZE + margin}" in caught.value.remedy


def test_training_at_another_scale_than_that_which_is_judged_is_refused(index: Index):
    with pytest.raises(ValueError, match="crop_margin 3 shows .* centre_margin 4"):
        run_config(index, {"crop_margin": 3}, data={"centre_margin": 4})


@pytest.mark.parametrize(
    "option", [{"crop_margin": 1}, {"brightness": 0.1}, {"saturation": 0.1}, {"flip": True}]
)
def test_features_computed_once_exclude_images_that_change(index: Index, option: dict[str, Any]):
    config = run_config(index, option, cache_teacher=True)
    method = build_method(config)
    wanted = pytest.raises(ConfigError, match="cache_teacher .* data.augment")
    with session.start() as here, wanted:
        open_loaders(config, index, method, here, POLL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_same_images_and_the_host_waits_for_nothing():
    image, seed = images(37), seeds_of(37)
    there = image.cuda(), seed.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = augment(*there, SIZE, ALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(changed.cpu(), augment(image, seed, SIZE, ALL), rtol=0, atol=1e-6)
