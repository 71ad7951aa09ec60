"""Masks: each patch hidden once, each image with a permutation of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdad_dist.errors import ConfigError
from kdad_dist.models.masks import PATTERNS, complement, fits, partition, random_masks

GRIDS = st.integers(1, 20)
NUMBERS = st.integers(2, 30)


@settings(deadline=None, max_examples=200)
@given(GRIDS, NUMBERS, st.sampled_from(PATTERNS), st.integers(0, 3))
def test_a_pattern_hides_every_patch_once_and_as_many_each_time_or_is_refused(
    grid: int, masks: int, pattern: str, seed: int
) -> None:
    if not fits(grid, masks, pattern):
        with pytest.raises(ConfigError, match=f"{pattern} with {masks} masks .* {grid} x {grid}"):
            partition(grid, masks, pattern, seed)
        return
    hidden = partition(grid, masks, pattern, seed)
    assert hidden.shape == (masks, grid**2 // masks)
    assert sorted(hidden.flatten().tolist()) == list(range(grid**2))
    visible = complement(hidden, grid**2)
    for mask in range(masks):
        assert visible[mask].tolist() == [
            n for n in range(grid**2) if n not in hidden[mask].tolist()
        ]


def test_stripes_are_the_originals() -> None:
    hidden = partition(32, 4, "stripes", 0)
    for mask in range(4):
        assert hidden[mask].tolist() == [j for j in range(1024) if j % 4 == mask]


def test_diagonals_and_lattices_are_where_they_shall_be() -> None:
    diagonal, lattice = (partition(8, 4, pattern, 0) for pattern in ("diagonal", "lattice"))
    for row in range(8):
        for column in range(8):
            number = row * 8 + column
            assert number in diagonal[(row + column) % 4].tolist()
            assert number in lattice[row % 2 * 2 + column % 2].tolist()


def test_under_a_diagonal_or_a_lattice_no_hidden_patch_touches_another_by_a_side() -> None:
    for pattern in ("diagonal", "lattice"):
        for mask in partition(8, 4, pattern, 0):
            hidden = torch.zeros(8, 8, dtype=torch.bool)
            hidden.view(-1)[mask] = True
            assert not (hidden[1:] & hidden[:-1]).any()
            assert not (hidden[:, 1:] & hidden[:, :-1]).any()


def test_random_partitions_follow_seed_and_number() -> None:
    first = partition(8, 4, "random", 0)
    assert torch.equal(first, partition(8, 4, "random", 0))
    others = [partition(8, 4, "random", 1), partition(8, 4, "random", 0, number=1)]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("grid", "masks", "pattern", "remedy"),
    [
        (14, 4, "stripes", r"masks=2, 7, 14; or method.inference.pattern=lattice, random"),
        (14, 5, "lattice", r"masks=4, 49, 196"),
        (9, 4, "random", r"masks=3, 9, 27, 81"),
        (1, 4, "diagonal", r"another data.image_size"),
    ],
)
def test_a_misfit_is_answered_with_what_fits(
    grid: int, masks: int, pattern: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=f"what fits: .*{remedy}"):
        partition(grid, masks, pattern, 0)


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 4))
@settings(deadline=None)
def test_a_training_mask_splits_all_patches_by_the_ratio(
    patches: int, ratio: float, images: int
) -> None:
    visible, hidden = random_masks(torch.arange(images), patches, ratio)
    assert visible.shape == (images, int(patches * (1 - ratio)))
    for row in torch.cat([visible, hidden], dim=1):
        assert sorted(row.tolist()) == list(range(patches))


def test_each_image_has_a_mask_of_its_own_wherever_it_stands() -> None:
    seeds = torch.arange(50)
    visible, _ = random_masks(seeds, 64, 0.75)
    assert len({tuple(row) for row in visible.tolist()}) == 50
    for n in (0, 7, 49):
        assert torch.equal(random_masks(seeds[n : n + 1], 64, 0.75)[0][0], visible[n])


def test_every_patch_is_visible_as_often_as_any_other() -> None:
    visible, _ = random_masks(torch.arange(4000), 64, 0.75)
    counts = visible.flatten().bincount(minlength=64)
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
