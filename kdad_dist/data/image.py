"""From the bytes of an image file to upright 8-bit pixels, by one stated rule for every kind.

The rules (normative: `shards/README.md`): the orientation of EXIF is applied; grey stays grey and
is repeated when RGB is asked for; of 16 bits the upper eight count; transparency is laid over
white; CMYK and other colour spaces become RGB. What cannot be trusted is refused by name: what is
not a picture, is cut short, has frames or pages, pixels without a known range, or too many pixels.
No torch here.
"""

import errno
import os
import struct
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kdad_dist.data.source import open_file
from kdad_dist.errors import DataError

Resize = Literal["squash", "shorter"]

EXTENSIONS = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",
    "BMP": "bmp",
    "TIFF": "tif",
    "WEBP": "webp",
}
"""The formats that are decoded, and the extension of each inside a shard. MPO is a JPEG of a
camera that carries a preview, a gain map or the other eye's view behind the picture."""
_FORMATS = [name for name in EXTENSIONS if name != "MPO"]  # Pillow opens MPO as a JPEG

MAX_PIXELS = 80_000_000
"""240 MB as RGB; a little below the number at which Pillow itself begins to warn."""
MAX_BYTES = 8 * MAX_PIXELS
"""Of a file: nothing that is decoded has more for each pixel than 16 bits of four channels."""
SMALLER = "make it smaller, or cut it into tiles"

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    # What Pillow's readers raise on damaged files (found by flipping and cutting bytes).
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    struct.error,
)


def read_file(path: Path) -> bytes:
    """The bytes of an image file; what is none, and may never end, is an OSError too."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than any picture", str(path))
        return file.read()


def decode_image(data: bytes, where: str) -> NDArray[np.uint8]:
    """RGB pixels, (h, w, 3), upright.

    Raises:
        DataError: these bytes are not one picture that can be trusted; names `where`.
    """
    return np.asarray(load_image(data, where)[0].convert("RGB"))


def upright_rgb(image: Image.Image, where: str) -> NDArray[np.uint8]:
    """RGB pixels, (h, w, 3), of a picture that somebody else opened, by the same rules.

    Raises:
        DataError: it is not one picture that can be trusted; names `where`.
    """
    _check_header(image, where)
    try:
        image.load()
        upright = _upright(image)
    except _DAMAGE as error:
        raise _undecodable(where, error) from None
    return np.asarray(_eight_bits(upright, where).convert("RGB"))


def decode_mask(data: bytes, where: str) -> NDArray[np.bool_]:
    """Where the mask is set, (h, w), upright.

    A pixel counts when it is not black (so that numbered regions count) and not fully transparent.
    In a JPEG, whose blacks are noisy, it counts from the middle of the range.

    Raises:
        DataError: these bytes are not one picture that can be trusted; names `where`.
    """
    image, file_format = _load(data, where)
    black = 127 if EXTENSIONS[file_format] == "jpg" else 0
    if image.mode == "P" or image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        return (pixels[..., :3].max(axis=-1) > black) & (pixels[..., 3] > 0)
    pixels = np.asarray(image)
    return (pixels if pixels.ndim == 2 else pixels.max(axis=-1)) > black


def load_image(data: bytes, where: str) -> tuple[Image.Image, str]:
    """The upright picture in mode L or RGB, and the extension that fits its bytes."""
    image, file_format = _load(data, where)
    return _eight_bits(image, where), EXTENSIONS[file_format]


def resize_image(image: NDArray[np.uint8], size: int, mode: Resize = "squash") -> NDArray[np.uint8]:
    """The image, (h, w, 3), with both sides (squash) or the shorter side of `size` pixels."""
    return np.asarray(resized(Image.fromarray(image), size, mode))


def resize_mask(mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """The mask at another size, by the nearest pixel."""
    image = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image)


def resized(image: Image.Image, size: int, mode: Resize) -> Image.Image:
    """Antialiased and bilinear, as torchvision's Resize does by default.

    Raises:
        DataError: the longer side would grow beyond all bounds.
    """
    width, height = target = (size, size)
    if mode == "shorter":
        scale = size / min(image.size)
        width, height = target = (round(image.width * scale), round(image.height * scale))
    if width * height > MAX_PIXELS:
        raise DataError(
            f"an image of {image.width} x {image.height} pixels would become {width} x {height}",
            f"crop it, or pack it with squashed sides; the limit is {MAX_PIXELS:,} pixels",
        )
    return image if image.size == target else image.resize(target, Image.Resampling.BILINEAR)


def _load(data: bytes, where: str) -> tuple[Image.Image, str]:
    """The upright picture in the mode of its file, and the name of its format."""
    if not data:
        raise DataError(f"{where} is empty", "restore the file, or leave it out")
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
        _check_header(image, where)
        if image.format == "PNG":
            image.verify()  # checksums, at which decoding does not look; 1 % of its time
            image = Image.open(BytesIO(data), formats=_FORMATS)
        image.load()
        file_format = image.format
        assert file_format is not None
        return _upright(image), file_format
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{where} is not an image of a known format (PNG, JPEG, BMP, TIFF, WebP)",
            "convert it to PNG, or leave it out",
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{where} says it has more than {2 * MAX_PIXELS:,} pixels", SMALLER
        ) from None
    except _DAMAGE as error:
        raise _undecodable(where, error) from None


def _undecodable(where: str, error: Exception) -> DataError:
    return DataError(f"{where} cannot be decoded: {error}", "restore the file, or leave it out")


def _upright(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, where: str) -> Image.Image:
    """The picture in mode L or RGB."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise DataError(
            f"{where} has 32 bits per pixel, whose black and white are not stated",
            "convert it to 8 or 16 bits",
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in {"L", "RGB"}:
        image = image.convert("RGB")
    return image


def _check_header(image: Image.Image, where: str) -> None:
    """Refuses by the header alone, before a pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{where} says it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}",
            SMALLER,
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(
            f"{where} holds {frames} frames or pages", "save the one that is meant as an image"
        )
