"""Anomaly maps as pictures: 16-bit files that keep the values, and colours over the image."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

# Ten points of matplotlib's inferno (CC0): perceptually uniform, readable without colour vision.
ANCHORS = (
    *("#000004", "#1b0c41", "#4a0c6b", "#781c6d", "#a52c60"),
    *("#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4"),
)


def save_png16(file: Path | BinaryIO, anomaly_map: NDArray[np.float32]) -> float:
    """Writes a 16-bit grey PNG; value = pixel / 65535 * scale.

    Returns:
        The scale, the map's maximum, which the PNG also carries as text under `scale`.
    """
    scale = float(anomaly_map.max())
    pixels = np.round(anomaly_map * (65535 / scale if scale > 0 else 0)).astype(np.uint16)
    text = PngImagePlugin.PngInfo()
    text.add_text("scale", repr(scale))
    Image.fromarray(pixels).save(file, "PNG", pnginfo=text)
    return scale


def heat(image: Image.Image, values: NDArray[np.float32]) -> Image.Image:
    """The grey image under the colours of `values` (h, w), of which 1 and more is brightest."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    level = np.clip(values, 0, 1)
    colour = colours()[(level * 255).astype(np.uint8)]
    weight = 0.6 + 0.3 * level[..., None]
    return Image.fromarray((grey * (1 - weight) + colour * weight).astype(np.uint8))


def colours() -> NDArray[np.float32]:
    """The colour map, (256, 3) in [0, 255]: straight lines between the anchors."""
    anchors = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in ANCHORS])
    at = np.linspace(0, len(ANCHORS) - 1, 256)
    channels = [np.interp(at, np.arange(len(ANCHORS)), anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=1).astype(np.float32)
