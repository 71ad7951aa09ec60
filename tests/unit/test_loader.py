"""Batches: the plan's rows, the pixels that were packed, and no thread left behind."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdad_dist.data.index import Index, Split
from kdad_dist.data.loader import IndexedLoader
from kdad_dist.data.pixels import open_pixels, pixel_key
from kdad_dist.data.plan import Plan
from kdad_dist.data.threads import Decoder, in_advance
from kdad_dist.errors import DataError
from tests.helpers import texture
from tests.launcher import wait_for
from tests.shards import make_shards

CPU = torch.device("cpu")
CACHES = ["ram", "device", "none"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("KDAD_CACHE", str(tmp_path / "cache"))
    return make_shards(tmp_path / "shards")


def open_loader(index: Index, cache: str = "ram", **plan) -> IndexedLoader:
    samples = index.select(Split.TRAIN, val_fraction=0)
    pixels = open_pixels(samples, index, 16, cache, CPU)
    return IndexedLoader(pixels, Plan(len(samples), **{"batch_size": 4} | plan), CPU)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kdad-read")]


@pytest.mark.parametrize("cache", CACHES)
def test_every_batch_holds_the_pixels_of_its_rows(index: Index, cache: str):
    loader = open_loader(index, cache)
    steps = list(loader.steps(0, 2 * loader.steps_per_epoch))
    assert [[micro.step_images for micro in step] for step in steps] == [[4], [4], [2]] * 2
    for step in steps:
        for micro in step:
            image, row = micro.batch.image, micro.batch.row
            assert image.dtype == torch.float32 and row.dtype == torch.int64
            assert image.is_contiguous(memory_format=torch.channels_last)
            for pixels, i in zip(image, row, strict=True):
                wanted = torch.from_numpy(texture(int(i), 16, 16)).permute(2, 0, 1) / 255
                assert torch.equal(pixels, wanted)
    seen = sorted(int(i) for step in steps[:3] for i in step[0].batch.row)
    assert seen == list(range(10))


@pytest.mark.parametrize("cache", CACHES)
def test_a_process_without_rows_gets_an_empty_batch(index: Index, cache: str):
    loader = open_loader(index, cache, batch_size=9, rank=2, world=3)
    last = list(loader.steps(0, 2))[1][0]
    assert last.batch.image.shape == (0, 3, 16, 16) and last.batch.row.shape == (0,)
    assert last.step_images == 1


def test_the_caches_agree_with_each_other_at_any_start(index: Index):
    loaders = [open_loader(index, cache, micro_batch_size=2) for cache in CACHES]
    for steps in zip(*(loader.steps(4, 9) for loader in loaders), strict=True):
        for micros in zip(*steps, strict=True):
            assert all(torch.equal(micros[0].batch.image, m.batch.image) for m in micros)
            assert all(torch.equal(micros[0].batch.row, m.batch.row) for m in micros)


def test_images_are_decoded_once_and_not_by_later_runs(index: Index, monkeypatch):
    first = list(open_loader(index).steps(0, 3))
    monkeypatch.setattr(Decoder, "into", lambda *_: pytest.fail("decoded again"))
    again = list(open_loader(index).steps(0, 3))
    assert torch.equal(first[2][0].batch.image, again[2][0].batch.image)


def test_the_cache_is_another_one_for_other_data_samples_or_sizes(index: Index, tmp_path: Path):
    samples = index.select(Split.TRAIN, val_fraction=0)
    other = make_shards(tmp_path / "other", train=11)
    keys = {
        pixel_key(samples, index, 16),
        pixel_key(samples[::-1], index, 16),
        pixel_key(samples[:9], index, 16),
        pixel_key(samples, index, 8),
        pixel_key(samples, index, 8, 8),
        pixel_key(samples, index, 12, 4),
        pixel_key(samples, other, 16),
    }
    assert len(keys) == 7
    assert pixel_key(list(samples), Index.read(index.root), 16) in keys


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_damaged_sample_is_named_where_it_is_due_and_no_thread_stays(index: Index, cache: str):
    shard = Path(index.root) / index.samples[3].shard
    shard.write_bytes(shard.read_bytes()[: index.samples[3].image.offset])
    with pytest.raises(DataError, match=index.samples[3].key):
        list(open_loader(index, cache).steps(0, 3))
    assert not threads()


def test_a_consumer_that_stops_early_leaves_no_thread(index: Index):
    steps = open_loader(index).steps(0, 10_000_000)
    next(steps)
    assert threads()
    steps.close()
    assert not threads()


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_a_cache_that_is_filled_leaves_no_thread(index: Index, cache: str):
    before = set(threading.enumerate())
    pixels = open_pixels(index.select(Split.TRAIN, val_fraction=0), index, 16, cache, CPU)
    assert len(pixels) == 10
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith("kdad-")]


def test_a_consumer_that_fails_leaves_no_thread(index: Index):
    with pytest.raises(ZeroDivisionError):
        for _ in open_loader(index).steps(0, 10_000_000):
            raise ZeroDivisionError
    assert not threads()


def test_work_is_done_ahead_of_use_but_not_without_bound():
    done: list[int] = []
    results = in_advance((lambda i=i: done.append(i) for i in range(100)), 2, 1)
    next(results)
    wait_for(lambda: len(done) == 3)
    time.sleep(0.05)
    assert done == [0, 1, 2]
    results.close()


def test_results_keep_their_order_and_an_error_comes_in_its_place():
    def call(i: int) -> int:
        return 1 // (5 - i)

    got: list[int] = []
    with pytest.raises(ZeroDivisionError):
        for value in in_advance((lambda i=i: call(i) for i in range(9)), 3, 2):
            got.append(value)
    assert got == [1 // (5 - i) for i in range(5)]


def test_targets_travel_with_their_rows(index: Index):
    class Twice:
        def read(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
            return torch.from_numpy(rows * 2), torch.from_numpy(rows * 3)

    plain = open_loader(index)
    loader = IndexedLoader(plain._pixels, plain._plan, CPU, Twice())
    for step in loader.steps(0, 3):
        batch = step[0].batch
        assert batch.targets is not None and plain.samples_seen(1) == 4
        assert torch.equal(batch.targets[0], batch.row * 2)
        assert torch.equal(batch.targets[1], batch.row * 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cache", CACHES)
def test_batches_on_a_gpu_equal_those_on_the_cpu(index: Index, cache: str):
    host = open_loader(index, cache)
    device = torch.device("cuda")
    samples = index.select(Split.TRAIN, val_fraction=0)
    there = IndexedLoader(open_pixels(samples, index, 16, cache, device), host._plan, device)
    for a, b in zip(host.steps(0, 6), there.steps(0, 6), strict=True):
        assert b[0].batch.image.is_cuda and b[0].batch.row.is_cuda
        torch.testing.assert_close(a[0].batch.image, b[0].batch.image.cpu(), rtol=0, atol=1e-6)
        assert torch.equal(a[0].batch.row, b[0].batch.row.cpu())
