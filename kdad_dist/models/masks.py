"""Which patches of an image are hidden: at random while training, each exactly once while scoring.

Patches are numbered row by row.
"""

import math

import torch
from jaxtyping import Int64
from torch import Tensor

from kdad_dist.draws import hashes
from kdad_dist.errors import ConfigError

PATTERNS = ("stripes", "diagonal", "lattice", "random")
MASK_STREAM = 0
"""Of `draws`, for the masks of training images."""
PARTITION_STREAM = 2
"""Of `draws`, for the first random partition; further ones have the streams that follow."""


def visible_count(patches: int, ratio: float) -> int:
    """How many patches stay visible where the share `ratio` of them is hidden."""
    return int(patches * (1 - ratio))


def random_masks(
    seed: Int64[Tensor, " b"], patches: int, ratio: float
) -> tuple[Int64[Tensor, "b v"], Int64[Tensor, "b h"]]:
    """The visible and the hidden patches of each image, drawn from its own seed."""
    order = hashes(seed, patches, MASK_STREAM).argsort(dim=1, stable=True)
    keep = visible_count(patches, ratio)
    return order[:, :keep], order[:, keep:]


def partition(
    grid: int, masks: int, pattern: str, seed: int, number: int = 0
) -> Int64[Tensor, "{masks} h"]:
    """The patches that each mask hides: all masks hide as many, and each patch is hidden once.

    Args:
        grid: patches along each side.
        pattern: "stripes" (mask m hides the columns m, m + M, ...), "diagonal" (row + column),
            "lattice" (a place in each k x k square, M = k * k), or "random" (parts of a
            permutation).
        seed, number: decide a random partition.

    Raises:
        ConfigError: the pattern does not fit the grid.
    """
    if not fits(grid, masks, pattern):
        raise _misfit(grid, masks, pattern)
    place = torch.arange(grid**2)
    row, column = place // grid, place % grid
    match pattern:
        case "stripes":
            owner = column % masks
        case "diagonal":
            owner = (row + column) % masks
        case "lattice":
            side = math.isqrt(masks)
            owner = row % side * side + column % side
        case "random":
            order = hashes(torch.tensor([seed]), grid**2, PARTITION_STREAM + number)[0].argsort()
            owner = torch.empty_like(order)
            owner[order] = place % masks
        case _:
            raise AssertionError(pattern)
    return owner.argsort(stable=True).view(masks, -1)


def complement(hidden: Int64[Tensor, "m h"], patches: int) -> Int64[Tensor, "m v"]:
    """The patches that stay visible under each mask, ascending."""
    is_hidden = torch.zeros(len(hidden), patches, dtype=torch.bool, device=hidden.device)
    is_hidden.scatter_(1, hidden, True)
    # False sorts before True, without a question to the device of how many there are.
    return is_hidden.byte().argsort(dim=1, stable=True)[:, : patches - hidden.shape[1]]


def fits(grid: int, masks: int, pattern: str) -> bool:
    """Whether so many masks of a pattern can hide equally many patches each, and all of them."""
    match pattern:
        case "lattice":
            side = math.isqrt(masks)
            return side**2 == masks and grid % side == 0
        case "random":
            return grid**2 % masks == 0
        case _:
            return grid % masks == 0


def _misfit(grid: int, masks: int, pattern: str) -> ConfigError:
    numbers = [m for m in range(2, grid**2 + 1) if fits(grid, m, pattern)]
    patterns = [p for p in PATTERNS if fits(grid, masks, p)]
    choices = []
    if numbers:
        shown = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
        choices.append(f"method.inference.masks={shown}")
    if patterns:
        choices.append(f"method.inference.pattern={', '.join(patterns)}")
    return ConfigError(
        f"pattern {pattern} with {masks} masks does not divide a grid of {grid} x {grid} patches "
        "into parts of equal size",
        f"what fits: {'; or '.join(choices) or 'another data.image_size (or data.tile)'}",
    )
