"""Makers of small images and data sets for tests."""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def texture(seed: int, height: int = 40, width: int = 48) -> NDArray[np.uint8]:
    """A random RGB image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_image(path: Path, image: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def square_mask(height: int = 40, width: int = 48, side: int = 10) -> NDArray[np.uint8]:
    """255 in a square at the top left, 0 elsewhere."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[4 : 4 + side, 4 : 4 + side] = 255
    return mask


def make_mvtec(
    root: Path, category: str = "tile", train: int = 6, good: int = 3, scratch: int = 4
) -> Path:
    """A category folder in the layout of MVTec AD, with one defect type and masks."""
    folder = root / category
    for i in range(train):
        save_image(folder / f"train/good/{i:03}.png", texture(i))
    for i in range(good):
        save_image(folder / f"test/good/{i:03}.png", texture(100 + i))
    for i in range(scratch):
        save_image(folder / f"test/scratch/{i:03}.png", texture(200 + i))
        save_image(folder / f"ground_truth/scratch/{i:03}_mask.png", square_mask())
    return folder


def header_of_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""
    chunks = b""
    for name, body in [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 100)),
        (b"IEND", b""),
    ]:
        chunks += struct.pack(">I", len(body)) + name + body
        chunks += struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def make_classes(
    root: Path, classes: tuple[str, ...] = ("blue", "green", "red"), train: int = 10, test: int = 4
) -> Path:
    """A folder of classes whose images differ by colour, a little, under noise."""
    for label, name in enumerate(classes):
        for i in range(train + test):
            image = texture(1000 * label + i, 32, 32) // 2
            image[..., (2 - label) % 3] += 100
            split = "train" if i < train else "test"
            save_image(root / split / name / f"{i:03}.png", image)
    return root
