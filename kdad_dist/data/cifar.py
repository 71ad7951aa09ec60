"""CIFAR-10's files: the binary version, and the Python version without running its pickles.

Rows of both: 3072 bytes, the red, green and blue plane of 32 x 32 pixels.
"""

import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdad_dist.data.records import Unusable

SIDE = 32
PIXELS = 3 * SIDE**2
IMAGES = 10_000
"""In each file, as published; a `.bin` file does not say how many it should hold."""
PYTHON_NAMES = "batches.meta"
BINARY_NAMES = "batches.meta.txt"

Rows = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images, (n, h, w) or (n, h, w, 3), and the number of the class of each, (n,)."""

_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_KNOWN = {*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype"}
_DAMAGE = (
    # What the unpickler raises on damaged files.
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)


def read_binary(path: Path) -> Rows:
    """The images of a `.bin` file.

    Raises:
        Unusable: it is no whole number of rows.
    """
    data, row = np.frombuffer(path.read_bytes(), np.uint8), 1 + PIXELS
    if len(data) % row:
        raise Unusable(
            path,
            f"holds {len(data):,} bytes, not a multiple of {row:,} (a label and 3 x {SIDE} x "
            f"{SIDE} pixels for each image; the published files have {IMAGES * row:,})",
        )
    rows = data.reshape(-1, row)
    return _planes_last(rows[:, 1:]), rows[:, 0]


def read_binary_names(folder: Path) -> list[str]:
    """The names of the classes, one on each line."""
    path = folder / BINARY_NAMES
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise Unusable(path, f"is not a text: {error}") from None


def read_python(path: Path) -> Rows:
    """The images of a pickled batch.

    Raises:
        Unusable: it is damaged, cut short, or no batch; nothing in it was run.
    """
    batch = _unpickled(path)
    pixels, labels = _pixels(batch.get("data")), batch.get("labels")
    if pixels is None:
        raise Unusable(path, f"has no entry data that is an array of n x {PIXELS:,} bytes")
    if not isinstance(labels, list) or not all(type(n) is int and 0 <= n < 256 for n in labels):
        raise Unusable(path, "has no entry labels that is a list of numbers from 0")
    if len(labels) != len(pixels):
        raise Unusable(path, f"has {len(labels):,} labels for {len(pixels):,} images")
    return _planes_last(pixels), np.array(labels, np.uint8)


def read_python_names(folder: Path) -> list[str]:
    """The names of the classes."""
    names = _unpickled(folder / PYTHON_NAMES).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unusable(folder / PYTHON_NAMES, "has no entry label_names that is a list of texts")
    return names


class _Named:
    """What a pickle calls by name, and what it says of it. It is remembered; nothing is called."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> "_Named":
        return _Named(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds numbers, texts, lists, dictionaries and `_Named`, and nothing else."""

    def find_class(self, module: str, name: str) -> _Named:
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no batch of CIFAR-10 does; nothing was run, "
                "and the binary version of CIFAR-10 holds no pickle"
            )
        return _Named(f"{module}.{name}")


def _unpickled(path: Path) -> dict[Any, Any]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        try:
            file.seek(0)
            # One wrong number here would make the unpickler take all the memory there is.
            for code, value, _ in pickletools.genops(file):
                if code.name in {"PUT", "LONG_BINPUT"} and int(value or 0) > size:
                    raise pickle.UnpicklingError(f"it numbers an object {value:,}")
            file.seek(0)
            found = _Unpickler(file, encoding="latin1").load()
        except _DAMAGE as error:
            reason = f"holds {size:,} bytes that are not a whole pickle of CIFAR-10: {error}"
            raise Unusable(path, reason) from None
    if not isinstance(found, dict):
        raise Unusable(path, "holds a pickle, but not one of a dictionary")
    return found


def _pixels(found: object) -> NDArray[np.uint8] | None:
    """The array that a pickle describes, (n, 3072); None: it is another one, or none."""
    match found:
        case _Named(name=name, state=(1, (int(n), int(width)), _Named() as kind, fortran, raw)):
            is_bytes = kind.name == "numpy.dtype" and kind.arguments[:1] == ("u1",)
            if name not in _RECONSTRUCT or not is_bytes or width != PIXELS:
                return None
        case _:
            return None
    # Python 2 wrote bytes as text.
    if isinstance(raw, str) and all(ord(char) < 256 for char in set(raw)):
        raw = raw.encode("latin1")
    if not isinstance(raw, bytes) or len(raw) != n * width:
        return None
    return np.frombuffer(raw, np.uint8).reshape(n, width, order="F" if fortran else "C")


def _planes_last(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
