"""A generated data set: close photographs of a woven cloth, sound and with subtle defects.

Every photograph shows another part of the cloth, turned a little, in another light; the dyes and
the threads vary and bend. A pixel of a defect therefore has a value that pixels of sound cloth have
too: comparing pixels with their mean over the training images finds next to nothing. What gives a
defect away is that it breaks the weave.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

CATEGORY = "cloth"
SIDE = 128
"""Height and width of an image, in pixels."""
OVERSAMPLING = 2
"""The cloth is drawn at this multiple of `SIDE`, then averaged down: no jagged threads."""
BAND = 3
"""Threads of one dye side by side, before those of the other."""
THREAD = 0.095
"""Distance between two threads, in the same unit: about 6 pixels."""

Plane = NDArray[np.float32]
"""One value for each pixel of the drawing, (h, w)."""
Colours = NDArray[np.float32]
"""(h, w, 3), linear, about 0 to 1."""


@dataclass
class Scene:
    """What one photograph shows. A defect changes one of its parts and says where."""

    u: Plane
    """Position on the cloth, along one set of threads; the middle of the image is 0."""
    v: Plane
    weave_u: Plane
    """Position in the weave: `u`, bent the way that soft threads bend."""
    weave_v: Plane
    contrast: Plane
    """How clearly the threads stand out; about 1."""
    tint: Colours
    """Factor of the cloth's colour."""
    overlay: Plane
    """Opacity of a thin thing that lies on the cloth, 0 to 1."""
    overlay_shade: float
    """Its brightness, relative to the cloth's."""


class Example(NamedTuple):
    """One image of the set, where it belongs, and its ground truth."""

    split: str
    defect_type: str
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    """Where the defect is; None for sound cloth."""


# --- Noise -------------------------------------------------------------------------------------


def smooth_noise(rng: Generator, cells: float, height: int, width: int) -> Plane:
    """Noise of mean 0 and deviation about 1 that changes over a `cells`-th part of the image."""
    shape = (int(np.ceil(cells)) + 4, int(np.ceil(cells)) + 4)
    grid = rng.standard_normal(shape).astype(np.float32)
    start = rng.uniform(1, 2, 2)
    rows = start[0] + np.linspace(0, cells, height, dtype=np.float32)
    columns = start[1] + np.linspace(0, cells, width, dtype=np.float32)
    # One direction after the other is much faster than all positions at once.
    across = _interpolate(grid, rows)
    noise = _interpolate(np.ascontiguousarray(across.T), columns).T
    return noise / max(float(noise.std()), 1e-6)


def _interpolate(grid: Plane, positions: Plane) -> Plane:
    """Rows of `grid` at fractional positions, with a smooth step between two of them."""
    low = positions.astype(int)
    part = (positions - low)[:, None]
    part = part * part * (3 - 2 * part)
    return (grid[low] * (1 - part) + grid[low + 1] * part).astype(np.float32)


def ramp(values: Plane, low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


# --- Sound cloth -------------------------------------------------------------------------------


def new_scene(rng: Generator) -> Scene:
    """Sound cloth: some part of it, turned, scaled, and bent the way that soft things are."""
    side = SIDE * OVERSAMPLING
    axis = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle = rng.uniform(-0.03, 0.03)
    scale = rng.uniform(0.985, 1.015)
    x, y = x / scale, y / scale
    u = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32)
    v = (np.cos(angle) * y - np.sin(angle) * x).astype(np.float32)
    phase_u, phase_v = rng.uniform(0, 4 * THREAD, 2)
    bend = 0.005
    return Scene(
        u=u,
        v=v,
        weave_u=u + phase_u + bend * smooth_noise(rng, 3, side, side),
        weave_v=v + phase_v + bend * smooth_noise(rng, 3, side, side),
        contrast=1 + 0.03 * smooth_noise(rng, 4, side, side),
        tint=np.ones((side, side, 3), np.float32),
        overlay=np.zeros((side, side), np.float32),
        overlay_shade=1,
    )


def weave(scene: Scene, rng: Generator) -> tuple[Plane, NDArray[np.bool_]]:
    """Brightness of a 2/2 twill, about 1, and where the thread on top is of the light dye."""
    x, y = scene.weave_u / THREAD, scene.weave_v / THREAD
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    lengthwise = (i - j) % 4 < 2
    across = np.where(lengthwise, x - i, y - j) - 0.5
    # Position along the two crossings that a thread spans, from -0.5 to 0.5.
    along = np.where(lengthwise, (i - j) % 4 + 1 - (y - j), (j - i - 1) % 4 + x - i) / 2 - 0.5
    own = rng.normal(1, 0.025, (2, 64))
    thread = np.where(lengthwise, own[0][i % 64], own[1][j % 64])
    round_ = np.cos(np.pi * across) ** 0.7 * (0.8 + 0.2 * np.cos(np.pi * along))
    light_dye = np.where(lengthwise, i, j) // BAND % 2 == 0
    return (0.50 + 0.72 * round_ * thread).astype(np.float32), light_dye


def photograph(scene: Scene, rng: Generator) -> NDArray[np.uint8]:
    """The scene in a light of its own, as a camera with some noise sees it; (SIDE, SIDE, 3)."""
    brightness, light_dye = weave(scene, rng)
    brightness = 1 + scene.contrast * (brightness - 1)
    dye = np.array([[0.66, 0.58, 0.46], [0.30, 0.34, 0.42]]) * rng.uniform(0.99, 1.01)
    dye = dye + rng.uniform(-0.008, 0.008, 3)
    image = np.where(light_dye[..., None], dye[0], dye[1]) * brightness[..., None] * scene.tint
    plain = dye.mean(0) * scene.overlay_shade
    image += scene.overlay[..., None] * (plain - image)
    towards = rng.uniform(0, 2 * np.pi)
    light = np.cos(towards) * scene.u + np.sin(towards) * scene.v
    image *= (rng.uniform(0.93, 1.07) * (1 + rng.uniform(0.02, 0.15) * light))[..., None]
    image = image.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING, 3).mean((1, 3))
    image += rng.normal(0, 0.008, image.shape)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


# --- Defects: each changes the scene and returns where, at the size of the drawing ---------------


def cut(scene: Scene, rng: Generator) -> Plane:
    """A thin, jagged, dark line, no darker than the gaps between threads."""
    line = _line(scene, rng, length=rng.uniform(0.5, 0.8), jag=0.35, width=6)
    scene.overlay, scene.overlay_shade = line * 0.95, 0.48
    return line


def stray_thread(scene: Scene, rng: Generator) -> Plane:
    """A thread that lies across the others in a bow, as bright as they are."""
    line = _line(scene, rng, length=rng.uniform(0.6, 1.0), jag=0.07, width=7)
    scene.overlay, scene.overlay_shade = line, 1.4
    return line


def misweave(scene: Scene, rng: Generator) -> Plane:
    """A patch woven in mirror image: its diagonals run the other way."""
    blob = _blob(scene, rng, rng.uniform(0.16, 0.24))
    scene.weave_u = np.where(blob > 0.5, -scene.weave_u, scene.weave_u)
    return blob


def worn(scene: Scene, rng: Generator) -> Plane:
    """A patch rubbed flat: the colour is right, the threads have all but gone."""
    blob = _blob(scene, rng, rng.uniform(0.16, 0.24))
    scene.contrast = (scene.contrast * (1 - 0.85 * blob)).astype(np.float32)
    return blob


def stain(scene: Scene, rng: Generator) -> Plane:
    """A faint, dry stain with a darker rim."""
    blob = _blob(scene, rng, rng.uniform(0.15, 0.22))
    rim = ndimage.gaussian_gradient_magnitude(blob, 2.5)
    depth = 0.2 * blob + 0.18 * rim / max(float(rim.max()), 1e-6)
    colour = np.array([0.7, 1.0, 1.3])
    scene.tint = (scene.tint * (1 - depth[..., None] * colour)).astype(np.float32)
    return blob


def slack(scene: Scene, rng: Generator) -> Plane:
    """Loose threads: they bulge out of line, and none of them is missing."""
    u, v = _somewhere(rng)
    size = rng.uniform(0.15, 0.2)
    bulge = np.exp(-((scene.u - u) ** 2 + (scene.v - v) ** 2) / size**2).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    scene.weave_u = scene.weave_u + np.float32(np.cos(angle) * 1.8 * THREAD) * bulge
    scene.weave_v = scene.weave_v + np.float32(np.sin(angle) * 1.8 * THREAD) * bulge
    return (bulge > 0.3).astype(np.float32)


DEFECTS: dict[str, Callable[[Scene, Generator], Plane]] = {
    "cut": cut,
    "misweave": misweave,
    "slack": slack,
    "stain": stain,
    "stray_thread": stray_thread,
    "worn": worn,
}


def _somewhere(rng: Generator) -> NDArray[np.float64]:
    """A point that is not too near the border of the image."""
    return rng.uniform(-0.7, 0.7, 2)


def _blob(scene: Scene, rng: Generator, size: float) -> Plane:
    """An irregular patch of about this radius: 1 inside, 0 outside, soft over a pixel or two."""
    u, v = _somewhere(rng)
    stretch = rng.uniform(0.8, 1.25)
    distance = np.hypot((scene.u - u) * stretch, (scene.v - v) / stretch)
    distance += 0.03 * smooth_noise(rng, 12, *distance.shape)
    return 1 - ramp(distance, size - 0.015, size + 0.015)


def _line(scene: Scene, rng: Generator, length: float, jag: float, width: int) -> Plane:
    """A thin walk across the cloth; `jag`: how much it turns, in radians, at each step."""
    steps = 12
    directions = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, jag, steps))
    walk = np.stack([np.cos(directions), np.sin(directions)], 1) * (length / steps)
    points = np.cumsum(walk, 0)
    points += _somewhere(rng) - points.mean(0)
    distance = np.full(scene.u.shape, np.inf, np.float32)
    for start, end in pairwise(points):
        along = (end - start).astype(np.float32)
        du, dv = scene.u - start[0], scene.v - start[1]
        t = np.clip((du * along[0] + dv * along[1]) / float(along @ along), 0, 1)
        distance = np.minimum(distance, np.hypot(du - t * along[0], dv - t * along[1]))
    pixel = 2 / (SIDE * OVERSAMPLING)
    return 1 - ramp(distance, (width / 2 - 1) * pixel, (width / 2 + 1) * pixel)


# --- The set -----------------------------------------------------------------------------------


def draw(seed: int, split: str, defect_type: str, number: int) -> Example:
    """One image of the set; the same arguments give the same pixels."""
    name = zlib.crc32(f"{split}/{defect_type}/{number}".encode())
    rng = np.random.default_rng([seed, name])
    scene = new_scene(rng)
    if defect_type == "good":
        return Example(split, defect_type, photograph(scene, rng), None)
    where = DEFECTS[defect_type](scene, rng)
    share = where.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING).mean((1, 3))
    mask = np.asarray(ndimage.binary_dilation(share > 0.3), bool)
    return Example(split, defect_type, photograph(scene, rng), mask)


def examples(seed: int, train: int, good: int, defective: int) -> Iterator[Example]:
    """The whole set: `train` + `good` sound pieces, and `defective` with each kind of defect."""
    for split, count in (("train", train), ("test", good)):
        yield from (draw(seed, split, "good", i) for i in range(count))
    for defect_type in DEFECTS:
        yield from (draw(seed, "test", defect_type, i) for i in range(defective))
