"""Data sets that come as a few files of many images: CIFAR-10, MNIST and Fashion-MNIST.

Which files these are, and how their classes are called, is stated in `shards/README.md`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from kdad_dist.data import cifar
from kdad_dist.data.idx import read_idx
from kdad_dist.data.index import Split
from kdad_dist.data.records import Record, Scan, Unusable, folders, make_key
from kdad_dist.errors import DataError
from kdad_dist.wording import enumerated

DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
"""T-shirt is published as T-shirt/top, which could not be the name of a folder."""
FASHION_BEGINS = {
    Split.TRAIN: [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    Split.TEST: [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
}
"""Its first labels, by which it is told from MNIST: the files have the same names and sizes."""


class Kind(StrEnum):
    PYTHON = "CIFAR-10 (python version)"
    BINARY = "CIFAR-10 (binary version)"
    IDX = "MNIST or a data set of its form"


@dataclass(frozen=True)
class _Part:
    """A file of images, and the one with their labels, which may be the same."""

    split: Split
    stem: str
    """Stands in the keys of its images."""
    images: Path
    labels: Path
    read: Callable[[], cifar.Rows]


def find_bundle(root: Path) -> tuple[Path, Kind, str] | None:
    """The folder, `root` or one in it, that holds such a data set; which, and one of its files.

    Raises:
        DataError: there are several.
    """
    found = [
        (folder, kind, file.name)
        for folder in (root, *folders(root))
        for kind in Kind
        if (file := next((p.images for p in _parts(folder, kind) if p.images.is_file()), None))
    ]
    if len(found) > 1:
        held = " and ".join(f"{kind} in {folder}" for folder, kind, _ in found)
        raise DataError(f"{root} holds {held}", "give the folder that holds only what is meant")
    return found[0] if found else None


def read_bundle(result: Scan, folder: Path, kind: Kind) -> None:
    """Adds an image for each row of each file; whole files that are bad become faults.

    Raises:
        DataError: the names of the classes cannot be read.
    """
    name, result.published = result.root.name, True
    usable = list(_usable(result, _parts(folder, kind)))
    classes = _class_names(folder, kind, [(part.split, labels) for part, _, labels in usable])
    if classes is FASHION:
        result.reason += ", and its labels begin as those of Fashion-MNIST"
    if kind is not Kind.IDX:
        result.reason += _unlike_published({part.images: len(labels) for part, _, labels in usable})
    for part, pixels, labels in usable:
        if (unknown := labels >= len(classes)).any():
            at = int(unknown.argmax())
            reason = f"says that image {at} is of class {labels[at]}, but the last of the "
            result.faults.append((part.labels, f"{reason}{len(classes)} is {len(classes) - 1}"))
            continue
        for at, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            kept = classes[int(label)]
            key = make_key(PurePath(name, part.split, kept, f"{part.stem}-{at:05}"))
            result.records.append(
                Record(key, part.images, part.split, name, class_name=kept, pixels=image)
            )


def _usable(
    result: Scan, parts: Sequence[_Part]
) -> Iterator[tuple[_Part, NDArray[np.uint8], NDArray[np.uint8]]]:
    for part in parts:
        try:
            pixels, labels = part.read()
        except FileNotFoundError as error:
            result.faults.append((Path(error.filename), "is missing beside the others"))
        except Unusable as error:
            result.faults.append((error.path, error.reason))
        else:
            if pixels.size:
                yield part, pixels, labels
            else:
                result.faults.append((part.images, "holds no image"))


def _unlike_published(counts: dict[Path, int]) -> str:
    """A clause about files of CIFAR-10 that are shorter or longer than they are published.

    They may be somebody's choice of images, or a file that was cut short between two of them.
    """
    other = [f"{file.name} has {n:,}" for file, n in counts.items() if n != cifar.IMAGES]
    if not other:
        return ""
    return f"; not as published, {cifar.IMAGES:,} images in each file: {enumerated(other, 2)}"


def _parts(folder: Path, kind: Kind) -> list[_Part]:
    """What the data set is made of, whether or not it is there."""
    if kind is Kind.IDX:
        parts = []
        for split, stem in ((Split.TRAIN, "train"), (Split.TEST, "t10k")):
            images, labels = (
                _variant(folder, f"{stem}-{what}", dimensions)
                for what, dimensions in (("images", 3), ("labels", 1))
            )
            read = partial(_read_pair, images, labels)
            parts.append(_Part(split, stem, images, labels, read))
        return parts
    suffix, read = {
        Kind.PYTHON: ("", cifar.read_python),
        Kind.BINARY: (".bin", cifar.read_binary),
    }[kind]
    stems = [(Split.TRAIN, f"data_batch_{n}") for n in range(1, 6)]
    files = [
        (s, stem, folder / f"{stem}{suffix}") for s, stem in (*stems, (Split.TEST, "test_batch"))
    ]
    return [_Part(split, stem, file, file, partial(read, file)) for split, stem, file in files]


def _variant(folder: Path, name: str, dimensions: int) -> Path:
    """The idx file as it lies there: unpacked before gzipped, under either name."""
    files = [
        folder / f"{name}{mark}idx{dimensions}-ubyte{suffix}"
        for suffix in ("", ".gz")
        for mark in "-."
    ]
    return next((file for file in files if file.is_file()), files[0])


def _read_pair(images: Path, labels: Path) -> cifar.Rows:
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise Unusable(
            labels, f"has {len(classes):,} labels, but {images.name} {len(pixels):,} images"
        )
    return pixels, classes


def _class_names(
    folder: Path, kind: Kind, labels: Sequence[tuple[Split, NDArray[np.uint8]]]
) -> Sequence[str]:
    """The name of each class, by its number."""
    if kind is Kind.IDX:
        fashion = any(rows[:10].tolist() == FASHION_BEGINS[split] for split, rows in labels)
        return FASHION if fashion else DIGITS
    read = cifar.read_python_names if kind is Kind.PYTHON else cifar.read_binary_names
    remedy = "restore the file: it names the classes"
    try:
        names = [name for name in read(folder) if name]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing", remedy) from None
    except Unusable as error:
        raise DataError(f"{error.path} {error.reason}", remedy) from None
    if len(set(names)) < max(len(names), 1) or not all(
        n.isprintable() and "/" not in n for n in names
    ):
        raise DataError(f"{folder} names its classes {names}", remedy)
    return names
