"""The files of CIFAR-10 and MNIST, as they are published, but with a few images in each."""

import gzip
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLASSES = ("airplane", "automobile", "bird", "cat")
CIFAR_FILES = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")


def python2_pickle(value: object) -> bytes:
    """What Python 2 and its numpy wrote: bytes as text, numpy.core, protocol 2."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: object) -> bytes:
    match value:
        case str():
            return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
        case int():
            return b"J" + struct.pack("<i", value)
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case dict():
            inner = b"".join(_opcodes(each) for pair in value.items() for each in pair)
            return b"}(" + inner + b"u"
        case np.ndarray():
            fortran = not value.flags.c_contiguous
            raw = value.tobytes("F" if fortran else "C").decode("latin1")
            shape = b"(" + b"".join(map(_opcodes, value.shape)) + b"t"
            kind = b"cnumpy\ndtype\n(" + _opcodes("u1") + b"K\0K\1tR"
            kind += b"(K\3" + _opcodes("|") + b"NNN" + _opcodes(-1) * 2 + b"K\0tb"
            made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85"
            made += _opcodes("b") + b"tR"
            order = b"\x88" if fortran else b"\x89"
            return made + b"(K\1" + shape + kind + order + _opcodes(raw) + b"tb"
    raise TypeError(type(value))


def cifar_rows(file: int, images: int = 4) -> tuple[NDArray[np.uint8], list[int]]:
    """Rows of planes, (images, 3072), and labels that take every class in turn."""
    rows = np.random.default_rng(file).integers(0, 256, (images, 3072), dtype=np.uint8)
    return rows, [(file + i) % len(CLASSES) for i in range(images)]


def make_cifar_python(folder: Path, protocol: int | None = None) -> Path:
    """Args:
    protocol: that of a newer Python and numpy, which have written them again.
    """
    folder.mkdir(parents=True)
    write = python2_pickle if protocol is None else lambda value: pickle.dumps(value, protocol)
    for number, file in enumerate(CIFAR_FILES):
        rows, labels = cifar_rows(number)
        batch = {"batch_label": "one of 5", "labels": labels, "data": rows, "filenames": ["a.png"]}
        (folder / file).write_bytes(write(batch))
    names = {"num_cases_per_batch": 4, "label_names": list(CLASSES), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(write(names))
    return folder


def make_cifar_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, file in enumerate(CIFAR_FILES):
        rows, labels = cifar_rows(number)
        data = b"".join(bytes([n]) + row.tobytes() for row, n in zip(rows, labels, strict=True))
        (folder / f"{file}.bin").write_bytes(data)
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    return folder


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = idx(array)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def make_mnist(
    folder: Path,
    train: Sequence[int] = (5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5),
    test: Sequence[int] = (7, 2, 1, 0, 4, 1, 4, 9, 5, 9),
    suffix: str = "",
    mark: str = "-",
    side: int = 28,
) -> Path:
    for seed, (stem, labels) in enumerate((("train", train), ("t10k", test))):
        shape = (len(labels), side, side)
        images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        write_idx(folder / f"{stem}-images{mark}idx3-ubyte{suffix}", images)
        write_idx(folder / f"{stem}-labels{mark}idx1-ubyte{suffix}", np.array(labels, np.uint8))
    return folder
