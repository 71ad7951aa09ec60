"""Random access to the samples of a shard folder: bytes, checked, then decoded and made square."""

import hashlib
import os
import threading
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from kdad_dist.data.image import (
    EXTENSIONS,
    Resize,
    decode_image,
    decode_mask,
    resize_image,
    resize_mask,
)
from kdad_dist.data.index import INDEX_FILE, Sample, parse_index
from kdad_dist.data.sample import Member
from kdad_dist.data.source import (
    fetch,
    is_remote,
    join,
    open_file,
    open_remote,
    patiently,
    read_of,
)
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.tiling import middle

IMAGE_EXTENSIONS = frozenset(EXTENSIONS.values())
"""Members with other extensions are never decoded, whatever the index says."""
FIT_VERSION = 1
"""Raised when `Fit` gives other pixels for the same bytes; cached pixels are then made again."""
OPEN_FILES = 64
DAMAGED = "copy or pack the shards again; `kdad verify` names every damaged member"


class Fit:
    """Turns decoded images and masks of any size into the square that the networks see.

    That is the centre of a square `margin` pixels larger. To make that one, "squash" changes the
    aspect ratio; "shorter" resizes the shorter side and takes the centre of the longer one.
    """

    def __init__(self, size: int, packed_size: int | None, mode: str, margin: int = 0) -> None:
        """Args:
            packed_size: side that the images were packed at; None: each has its original size.

        Raises:
            ConfigError: the images were packed too small.
        """
        check_size(packed_size, size, margin, "data.centre_margin")
        self.size = size
        self.square = size + margin
        self.mode: Resize = "shorter" if mode == "shorter" else "squash"

    def image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(size, size, 3)."""
        return self._crop(resize_image(image, self.square, self.mode))

    def mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(size, size)."""
        return self._crop(resize_mask(mask, *self._resized(*mask.shape)))

    def seen(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of an image of this size that the networks see any of."""
        sides = zip((height, width), self._resized(height, width), strict=True)
        found = [(side, resized, self._window(resized)) for side, resized in sides]
        rows, columns = (
            slice(part.start * side // resized, -(-part.stop * side // resized))
            for side, resized, part in found
        )
        return rows, columns

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this size is resized to."""
        if self.mode == "squash":
            return self.square, self.square
        scale = self.square / min(height, width)
        return round(height * scale), round(width * scale)

    def _window(self, resized: int) -> slice:
        """Where what the networks see lies along a side that was resized."""
        square, window = middle(resized, self.square), middle(self.square, self.size)
        return slice(square.start + window.start, square.start + window.stop)

    def _crop(self, array: NDArray) -> NDArray:
        rows, columns = (self._window(side) for side in array.shape[:2])
        return array[rows, columns]


class ShardReader:
    """Reads single samples from local shards, or from remote ones by range requests.

    May be shared by threads. Every member's hash is checked before its bytes are decoded.
    """

    def __init__(self, root: str, image_size: int, margin: int = 0) -> None:
        """Args:
            margin: pixels by which images are read larger before their centre is cut out.

        Raises:
            ConfigError: the images were packed too small, or the address is of no known kind.
            DataError: there is no index at `root`.
        """
        check_root(root)
        described = parse_index(fetch(root, INDEX_FILE), root)
        self.root = root
        self.image_size = image_size
        self._fit = Fit(image_size, described["image_size"], described["resize"], margin)
        self._files = OpenFiles()

    def image(self, sample: Sample) -> NDArray[np.uint8]:
        """RGB, (image_size, image_size, 3)."""
        data = self._member(sample, sample.image)
        return self._fit.image(decode_image(data, self._where(sample)))

    def mask(self, sample: Sample) -> NDArray[np.bool_]:
        """(image_size, image_size), True on defects; all False where the sample has no mask."""
        if sample.mask is None:
            return np.zeros((self.image_size, self.image_size), dtype=np.bool_)
        data = self._member(sample, sample.mask)
        return self._fit.mask(decode_mask(data, f"mask of {self._where(sample)}"))

    def truth(self, sample: Sample) -> NDArray[np.bool_] | None:
        """As `mask`; None where a sample is defective, and nobody has marked where."""
        known = sample.mask is not None or sample.gt_label == 0
        return self.mask(sample) if known else None

    def _where(self, sample: Sample) -> str:
        return f"{sample.key} in {join(self.root, sample.shard)}"

    def _member(self, sample: Sample, member: Member) -> bytes:
        address = shard_address(self.root, sample.shard)
        try:
            if is_remote(self.root):
                data = patiently(address, lambda: read_range(address, member.offset, member.size))
            else:
                data = self._files.read(address, member.offset, member.size)
        except (OSError, HTTPException) as error:
            raise DataError(
                f"{self._where(sample)} cannot be read: {error}",
                "check that the shard is there and that you may read it",
            ) from None
        check_member(data, member, self._where(sample))
        return data


class OpenFiles:
    """Local files kept open, because opening costs far more than reading on network file systems.

    Threads share them: `pread` moves no file position. A file that is pushed out by others closes
    when the last thread that reads from it lets go.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._open.pop(path, None) or open_file(path, buffering=0)
            self._open[path] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return os.pread(file.fileno(), size, offset)


def check_size(packed_size: int | None, size: int, margin: int, key: str) -> None:
    """Refuses to enlarge images that were packed at some size.

    Args:
        margin: pixels beside `size` that are to be read, as the configuration's `key` says.
    """
    wanted = size + margin
    if packed_size is None or packed_size >= wanted:
        return
    if not margin:
        raise ConfigError(
            f"data.image_size is {size}, but the shards hold images of {packed_size} pixels",
            f"pack the data set again with --size {size}, or set data.image_size={packed_size}",
        )
    raise ConfigError(
        f"data.image_size={size} and {key}={margin} need images of {wanted} pixels, but the shards "
        f"hold images of {packed_size}",
        f"pack the data set again with --size {wanted}, or set one of the two smaller",
    )


def check_root(root: str) -> None:
    """Refuses addresses that are neither folders nor http(s), such as `pipe:` and `s3:`."""
    if is_remote(root) or ":" not in root.partition("/")[0] or Path(root).exists():
        return
    raise ConfigError(
        f"data.shards is {root!r}: only folders and http(s) addresses are read",
        "copy the shards to a folder, or serve them over http",
    )


def shard_address(root: str, file: str) -> str:
    """Path or URL of a shard; a name that leads out of the folder is refused."""
    if PurePosixPath(file).name != file or file in {".", ".."}:
        raise DataError(f"the index of {root} names the shard {file!r}, not a plain file", DAMAGED)
    return join(root, quote(file) if is_remote(root) else file)


def read_range(address: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a remote file."""
    wanted = {"Range": f"bytes={offset}-{offset + size - 1}"}
    with open_remote(address, wanted) as answer:
        if answer.status != 206:
            raise DataError(
                f"the server of {address} cannot send parts of a file",
                "set data.access=stream, or copy the shards to a folder",
            )
        return read_of(answer, size)


def check_member(data: bytes, member: Member, where: str) -> None:
    """Raises DataError unless these are the member's bytes, and of a kind that may be decoded."""
    if member.ext.rsplit(".", 1)[-1].lower() not in IMAGE_EXTENSIONS:
        raise DataError(
            f"{where} has the extension {member.ext!r}, which is not decoded",
            f"pack images as one of: {', '.join(sorted(IMAGE_EXTENSIONS))}",
        )
    if hashlib.sha256(data).hexdigest() != member.sha256:
        raise DataError(f"{where}: the bytes of .{member.ext} do not match the index", DAMAGED)
