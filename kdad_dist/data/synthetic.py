"""Seeded defects pasted into normal images, for choosing without looking at real defects.

Shapes and contrasts are drawn wide, from plain to barely visible: scratches, spots, smears, patches
of the image itself in the wrong place (CutPaste: Li et al. 2021; NSA: Schlüter et al. 2022) with
noise-shaped outlines (DRAEM: Zavrtanik et al. 2021), stains, and chipped edges. They rank
settings; they do not predict the figures on real defects. No torch here.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Picture = NDArray[np.floating]
Alpha = NDArray[np.floating]
"""How much of the defect each pixel takes, 0 to 1, (h, w)."""

ATTEMPTS = 12
VISIBLE = 4.0
"""Grey levels that a pixel must change, above the image's own grain, to count as defective."""


class Draw:
    """Random numbers from a text, built on raw bits: the stream that numpy promises to keep."""

    def __init__(self, text: str) -> None:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        self._bits = np.random.PCG64(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def ratio(self, low: float, high: float) -> float:
        """Between two positive numbers, each doubling as likely as the next."""
        return math.exp(self.between(math.log(low), math.log(high)))

    def below(self, count: int) -> int:
        return int(self.between(0, count))

    def chance(self, probability: float) -> bool:
        return self.between(0, 1) < probability

    def noise(self, shape: tuple[int, int], scale: float) -> Alpha:
        """A smooth random field with features of `scale` pixels, mean 0, deviation 1."""
        # White noise on a coarse grid is as good for a smooth field, and far quicker to filter.
        step = max(1.0, scale / 2)
        grid = [math.ceil(side / step) + 4 for side in shape]
        raw = self._bits.random_raw(grid[0] * grid[1]).reshape(grid) >> np.uint64(11)
        coarse = ndimage.gaussian_filter((raw * 2.0**-53).astype(np.float32), scale / step)
        at = [np.arange(side) / step + 1.5 for side in shape]
        field = np.asarray(
            ndimage.map_coordinates(coarse, np.meshgrid(*at, indexing="ij"), order=1)
        )
        return (field - field.mean()) / max(float(field.std()), 1e-6)


def synthetic_defect(
    image: NDArray[np.uint8], key: str, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The image with one defect, and where its pixels changed visibly, (h, w).

    The same for the same image, key and seed on any machine.
    """
    draw = Draw(f"{seed}/{key}")
    before = image.astype(np.float32)
    grain = np.abs(before - _blur(before, 1.0)).mean()
    for _ in range(ATTEMPTS):
        after = KINDS[draw.below(len(KINDS))](before, draw)
        result = np.clip(np.rint(after), 0, 255).astype(np.uint8)
        mask = changed(image, result, VISIBLE + float(grain))
        if mask.sum() >= (min(mask.shape) / 64) ** 2:
            return result, mask
    # For images on which little shows, such as black ones: a plain spot, inverted.
    spot = blob(draw, image.shape[:2], 0.05) > 0.5
    return np.where(spot[..., None], image ^ 255, image), spot


def changed(
    before: NDArray[np.uint8], after: NDArray[np.uint8], threshold: float
) -> NDArray[np.bool_]:
    """Where the images differ by more than `threshold` grey levels, without its pinholes."""
    difference = np.abs(after.astype(np.float32) - before.astype(np.float32)).max(axis=2)
    scale = min(before.shape[:2]) / 256
    mask = (ndimage.gaussian_filter(difference, scale) > threshold) & (difference > 0)
    return np.asarray(ndimage.binary_closing(mask, iterations=max(1, round(2 * scale))), np.bool_)


def scratch(image: Picture, draw: Draw) -> Picture:
    """One to three thin curved lines, dark (cracks) or bright (scratches)."""
    alpha = np.zeros(image.shape[:2], dtype=np.float32)
    heading = draw.between(0, 2 * math.pi)
    for _ in range(1 + draw.below(3) * draw.below(2)):
        alpha = np.maximum(alpha, curve(draw, image.shape[:2], heading))
    return shade(image, alpha, draw, draw.ratio(0.15, 0.9), dark=0.75)


def spots(image: Picture, draw: Draw) -> Picture:
    """One to four small irregular spots: pores, grains, droplets."""
    alpha = np.zeros(image.shape[:2], dtype=np.float32)
    size = draw.ratio(0.008, 0.05)
    for _ in range(1 + draw.below(4) * draw.below(2)):
        alpha = np.maximum(alpha, blob(draw, image.shape[:2], size * draw.between(0.7, 1.3)))
    return shade(image, alpha, draw, draw.ratio(0.25, 0.95), dark=0.7)


def stain(image: Picture, draw: Draw) -> Picture:
    """A large region of another brightness, with soft or hard edges, or a band across the image."""
    shape = image.shape[:2]
    alpha = band(draw, shape) if draw.chance(0.4) else blob(draw, shape, draw.ratio(0.08, 0.3))
    return shade(image, alpha, draw, draw.ratio(0.08, 0.45), dark=0.6)


def smear(image: Picture, draw: Draw) -> Picture:
    """A region whose texture is wiped out, evenly or in one direction."""
    alpha = blob(draw, image.shape[:2], draw.ratio(0.05, 0.2))
    length = draw.ratio(2, 8) * min(image.shape[:2]) / 256
    if draw.chance(0.5):
        wiped = _blur(image, length)
    else:
        axis = draw.below(2)
        wiped = ndimage.uniform_filter1d(image, round(4 * length) + 2, axis=axis, mode="nearest")
    return mix(image, shade(wiped, alpha, draw, draw.ratio(0.02, 0.15), dark=0.5), alpha)


def patch(image: Picture, draw: Draw) -> Picture:
    """A region filled with another part of the image, turned and a little brighter or darker."""
    height, width = image.shape[:2]
    alpha = blob(draw, (height, width), draw.ratio(0.04, 0.2))
    shift = [round(draw.between(0.2, 0.8) * side) for side in (height, width)]
    turned = np.rot90(image, 1 + draw.below(3))
    zoom = draw.ratio(0.7, 1.5)
    rows, columns = (
        (np.arange(side) * zoom + offset).astype(int) % limit
        for side, offset, limit in zip((height, width), shift, turned.shape, strict=False)
    )
    other = turned[rows][:, columns] * draw.ratio(0.75, 1.3)
    return mix(image, other, alpha)


def chip(image: Picture, draw: Draw) -> Picture:
    """A piece broken off at the border: dark or pale, rough, with a hard outline."""
    height, width = image.shape[:2]
    side, along = draw.below(4), draw.between(0.05, 0.95)
    centre = ((0.0, along), (1.0, along), (along, 0.0), (along, 1.0))[side]
    alpha = blob(draw, (height, width), draw.ratio(0.03, 0.15), centre, softness=0.08)
    rough = 1 + 0.12 * draw.noise((height, width), 2.5 * min(height, width) / 256)
    return mix(
        image, shade(image * rough[..., None], alpha, draw, draw.ratio(0.2, 0.8), 0.7), alpha
    )


KINDS: tuple[Callable[[Picture, Draw], Picture], ...] = (scratch, spots, stain, smear, patch, chip)


def shade(image: Picture, alpha: Alpha, draw: Draw, strength: float, dark: float) -> Picture:
    """Darkens (with probability `dark`) or brightens by `strength`, where `alpha` says so.

    Multiplies, so that the texture underneath stays. A grey image stays grey.
    """
    grey = bool((image[..., :1] == image).all())
    tint = np.array([1.0 if grey else draw.between(0.6, 1.4) for _ in range(3)], dtype=np.float32)
    amount = np.clip(strength * tint, 0, 1) * alpha[..., None]
    return image * (1 - amount) if draw.chance(dark) else image + (255 - image) * amount


def mix(image: Picture, other: Picture, alpha: Alpha) -> Picture:
    return image + (other - image) * alpha[..., None]


def blob(
    draw: Draw,
    shape: tuple[int, int],
    size: float,
    centre: tuple[float, float] | None = None,
    softness: float | None = None,
) -> Alpha:
    """An ellipse whose outline is bent by noise.

    Args:
        size: radius, as a share of the shorter side.
        centre: as shares of height and width; drawn where None.
        softness: width of the edge as a share of the radius; drawn where None.
    """
    radius = max(1.5, size * min(shape))
    row, column = centre or (draw.between(0.04, 0.96), draw.between(0.04, 0.96))
    y, x = np.ogrid[: shape[0], : shape[1]]
    y, x = y - row * shape[0], x - column * shape[1]
    angle, stretch = draw.between(0, math.pi), draw.ratio(1, 2.5)
    along = (x * math.cos(angle) + y * math.sin(angle)) / stretch
    across = (y * math.cos(angle) - x * math.sin(angle)) * math.sqrt(stretch)
    distance = np.sqrt(along**2 + across**2) / radius
    bend = draw.between(0.1, 0.4) * draw.noise(shape, max(1.0, radius / 2.5))
    edge = softness if softness is not None else draw.ratio(0.05, 0.6)
    edge = max(edge, 1 / radius)
    inside = (1 - distance + bend * (distance < 2)) / edge
    return np.clip(inside, 0, 1).astype(np.float32)


def band(draw: Draw, shape: tuple[int, int]) -> Alpha:
    """A stripe along a border or across the image, with a wavy edge."""
    axis = draw.below(2)
    place = np.arange(shape[axis]) / shape[axis]
    start, width = draw.between(-0.2, 0.9), draw.ratio(0.06, 0.3)
    distance = np.expand_dims(np.abs(place - start - width / 2) - width / 2, 1 - axis)
    wave = draw.between(0.005, 0.03) * draw.noise(shape, min(shape) / 8)
    return np.clip((wave - distance) / draw.ratio(0.01, 0.1) + 0.5, 0, 1).astype(np.float32)


def curve(draw: Draw, shape: tuple[int, int], heading: float) -> Alpha:
    """A thin line that wanders, its width and depth uneven."""
    side = min(shape)
    steps = round(draw.ratio(0.08, 0.7) * side)
    turning = draw.noise((1, max(steps, 2)), max(2.0, side / 16))[0]
    angle = heading + draw.between(0.1, 0.7) * turning
    row = draw.between(0.1, 0.9) * shape[0] + np.cumsum(np.sin(angle))
    column = draw.between(0.1, 0.9) * shape[1] + np.cumsum(np.cos(angle))
    inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    off_line = np.ones(shape, dtype=bool)
    off_line[row[inside].astype(int), column[inside].astype(int)] = False
    if off_line.all():
        return np.zeros(shape, dtype=np.float32)
    distance = np.asarray(ndimage.distance_transform_edt(off_line))
    width = draw.ratio(0.5, 2.5) * side / 256 * (1 + 0.4 * draw.noise(shape, side / 24))
    depth = np.clip(1 + 0.35 * draw.noise(shape, side / 12), 0.2, 1)
    return (np.clip(width - distance + 0.5, 0, 1) * depth).astype(np.float32)


def _blur(image: Picture, sigma: float) -> Picture:
    return np.asarray(ndimage.gaussian_filter(image, (sigma, sigma, 0)))
