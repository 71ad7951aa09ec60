"""MNIST's file format ("idx"): an array of bytes behind its shape, often gzipped."""

import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdad_dist.data.records import Unusable

_UNSIGNED_BYTES = 8
"""The kind of value, in the third byte."""
_MOST = 2**31
"""No gzip file is unpacked further; MNIST's largest takes 47 MB."""
_GZIP = 31
"""zlib's word for: 15 bits of window, and the header and checksum of gzip."""


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in the file, of the shape that its header says.

    Raises:
        Unusable: it is damaged, cut short, or not an array of bytes in so many dimensions.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = _unpacked(path, data)
    magic, start = bytes([0, 0, _UNSIGNED_BYTES, dimensions]), 4 + 4 * dimensions
    if len(data) < start or data[:4] != magic:
        raise Unusable(
            path,
            f"begins with {data[:4].hex(' ') or 'nothing'} and holds {len(data):,} bytes; an array "
            f"of bytes in {dimensions} dimensions begins with {magic.hex(' ')} and its shape",
        )
    shape = tuple(np.frombuffer(data, ">u4", dimensions, offset=4).tolist())
    if len(data) != start + math.prod(shape):
        raise Unusable(
            path,
            f"holds {len(data):,} bytes, not the {start + math.prod(shape):,} that its header "
            f"announces ({' x '.join(map(str, shape))})",
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _unpacked(path: Path, data: bytes) -> bytes:
    """What is in a gzip file, or as much of it as is ever unpacked."""
    stream = zlib.decompressobj(_GZIP)
    try:
        content = stream.decompress(data, _MOST)
    except zlib.error as error:
        raise Unusable(path, f"is not a sound gzip file: {error}") from None
    if stream.unused_data:
        raise Unusable(path, f"goes on for {len(stream.unused_data):,} bytes behind its end")
    if not stream.eof and len(content) < _MOST:
        raise Unusable(
            path,
            f"is cut short: its {len(data):,} bytes are not a whole gzip file, and hold "
            f"{len(content):,} bytes of what was in it",
        )
    return content
