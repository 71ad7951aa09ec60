"""The histogram of pixel scores: exact to merge, bounded in memory, strict about its input."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdad_dist.errors import KdadError
from kdad_dist.metrics.curves import aupro, auroc, average_precision
from kdad_dist.metrics.histogram import BINS, ONE_REGION, ScoreHistogram
from tests.launcher import run_ranks


def scored_images(seed: int, images: int = 8, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Maps and masks; every third image is good, the others have up to three regions."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, side, side), bool)
    for i in range(images):
        for _ in range(i % 3 and int(rng.integers(1, 4))):
            y, x = rng.integers(0, side - 6, 2)
            masks[i, y : y + rng.integers(1, 6), x : x + rng.integers(1, 6)] = True
    maps = rng.gamma(2, 1, masks.shape) + masks
    return maps.astype(np.float32), masks


def state(histogram: ScoreHistogram) -> list:
    arrays = [histogram.normal, histogram.defective, histogram.overlap]
    return [histogram.regions, *(array.tobytes() for array in arrays)]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), owner=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_any_partition_merged_in_any_order_holds_the_same_counts(seed: int, owner: list[int]):
    maps, masks = scored_images(seed)
    whole = ScoreHistogram()
    whole.update(maps, masks)
    parts = [ScoreHistogram() for _ in range(4)]
    for anomaly_map, mask, part in zip(maps, masks, owner, strict=True):
        parts[part].update(anomaly_map, mask)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged = ScoreHistogram()
        for part in order:
            merged.merge(parts[part])
        assert state(merged) == state(whole)


def test_every_pixel_is_counted_once_and_every_region_weighs_the_same():
    maps, masks = scored_images(1)
    histogram = ScoreHistogram()
    histogram.update(maps, masks)
    assert histogram.normal.sum() == (~masks).sum()
    assert histogram.defective.sum() == masks.sum()
    assert histogram.regions > 3
    assert histogram.overlap.sum() == pytest.approx(histogram.regions * ONE_REGION, rel=1e-9)


def test_regions_that_touch_at_a_corner_are_one():
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[3, 0] = True
    histogram = ScoreHistogram()
    histogram.update(np.ones((4, 4), np.float32), mask)
    assert histogram.regions == 2


def test_regions_of_different_images_never_join():
    histogram = ScoreHistogram()
    histogram.update(np.ones((3, 2, 2), np.float32), np.ones((3, 2, 2), bool))
    assert histogram.regions == 3


def test_a_perfect_map_scores_one():
    _, masks = scored_images(2)
    histogram = ScoreHistogram()
    histogram.update(masks.astype(np.float32), masks)
    counts = histogram.counts()
    assert (auroc(counts), average_precision(counts), aupro(counts)) == (1, 1, 1)


def test_a_constant_map_is_at_chance():
    _, masks = scored_images(3)
    histogram = ScoreHistogram()
    histogram.update(np.full(masks.shape, 0.7, np.float32), masks)
    counts = histogram.counts()
    assert auroc(counts) == 0.5
    assert aupro(counts) == pytest.approx(0.15)
    assert average_precision(counts) == pytest.approx(masks.mean())


@pytest.mark.parametrize("wrong", [-1e-3, np.nan, np.inf, -np.inf])
def test_a_negative_or_non_finite_score_is_refused_and_nothing_counted(wrong: float):
    anomaly_map = np.ones((2, 3, 3), np.float32)
    anomaly_map[1, 0, 2] = wrong
    histogram = ScoreHistogram()
    with pytest.raises(KdadError, match=rf"1 of 18 pixel scores .* {wrong}"):
        histogram.update(anomaly_map, np.ones((2, 3, 3), bool))
    assert state(histogram) == state(ScoreHistogram())


def test_negative_zero_is_zero():
    negative, positive = ScoreHistogram(), ScoreHistogram()
    negative.update(np.array([[-0.0, 1.0]], np.float32))
    positive.update(np.array([[0.0, 1.0]], np.float32))
    assert state(negative) == state(positive)


def test_scores_from_the_smallest_to_the_largest_float_are_counted_in_order():
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    histogram = ScoreHistogram()
    histogram.update(np.array([[0, tiny, 1e-20, 1, huge]], np.float32))
    assert histogram.normal.sum() == 5
    assert histogram.normal[BINS - 1] == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_maps_of_other_float_types_are_counted(dtype: type):
    histogram = ScoreHistogram()
    histogram.update(np.linspace(0, 1, 12, dtype=dtype).reshape(3, 4).T)  # not contiguous
    assert histogram.normal.sum() == 12


def test_what_is_packed_holds_the_same_counts_and_no_empty_bins():
    histogram = ScoreHistogram()
    assert state(ScoreHistogram.unpack(**histogram.pack())) == state(histogram)
    histogram.update(*scored_images(4))
    assert state(ScoreHistogram.unpack(**histogram.pack())) == state(histogram)
    assert (histogram.pack()["counts"].sum(axis=0) > 0).all()


def test_memory_does_not_depend_on_the_number_of_images():
    histogram = ScoreHistogram()
    for seed in range(5):
        histogram.update(*scored_images(seed))
    arrays = (histogram.normal, histogram.defective, histogram.overlap)
    assert sum(array.nbytes for array in arrays) < 13_000_000


def megabytes_of_a_hundred() -> float:
    """Resident memory that a hundred histograms take."""

    def megabytes() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    maps, masks = scored_images(6)
    before = megabytes()
    histograms = [ScoreHistogram() for _ in range(100)]
    for histogram in histograms:
        histogram.update(maps, masks)
    return megabytes() - before


def test_a_hundred_histograms_take_memory_only_for_the_bins_in_use():
    resident, huge = Path("/proc/self/statm"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not resident.exists() or (huge.exists() and "[always]" in huge.read_text()):
        pytest.skip("needs /proc, and a system that does not hand out huge pages unasked")
    # In a process of its own: where much was freed before, malloc must clear what it hands out.
    [found] = run_ranks(megabytes_of_a_hundred, 1)
    assert found < 200  # all pages of all of them: 1253
