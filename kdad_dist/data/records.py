"""What a layout is read into: keys, image files in a fixed order, masks paired by their names."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdad_dist.data.index import Split
from kdad_dist.errors import UsageError

Layout = Literal["mvtec", "visa", "folder", "classes"]

GOOD = "good"
MASKS = "ground_truth"
UNMASKED = "has no mask of its name"
"""Begins the reason where an image needs a mask, since others of its category have one."""
DECODED = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp"}
# Plainly meant as images: to be refused by name, not overlooked.
REFUSED = {".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".pgm", ".ppm", ".exr", ".dng"}


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what its place says of it."""

    key: str
    """Unique and readable: the path from the category on, without suffix, escaped."""
    path: Path
    split: Split
    category: str
    class_name: str | None = None
    defect_type: str | None = None
    gt_label: int | None = None
    mask: Path | None = None
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """(h, w) or (h, w, 3), where the file at `path` holds many images; else it is this one."""

    @property
    def bytes(self) -> int:
        """About what the image takes as it is."""
        return self.path.stat().st_size if self.pixels is None else self.pixels.nbytes


class Unusable(Exception):
    """A file that cannot be used, with the reason as a clause: "has no mask"."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason


@dataclass
class Scan:
    """What is below a folder."""

    root: Path
    layout: Layout
    reason: str
    """Why it is this layout, as a clause: "tile/train/good exists"."""
    records: list[Record] = field(default_factory=list)
    """Sorted by category, split and key; every key once."""
    faults: list[tuple[Path, str]] = field(default_factory=list)
    """Files that cannot be used, with the reason; no record holds them."""
    published: bool = False
    """It is a data set of a few files of many images each, of which none can be left out."""
    unused: list[Path] = field(default_factory=list)
    """Folders that hold images for which the layout has no use."""

    def add(self, folder: Path, path: Path, split: Split) -> None:
        """A normal image of the category `folder`."""
        self.records.append(Record(key_of(folder, path), path, split, folder.name, gt_label=0))

    def add_defect(
        self, folder: Path, path: Path, defect: str, name: PurePath, masks: "Masks"
    ) -> None:
        """A defective test image; `name` is its path without suffix below the masks' folder."""
        found = masks.take(defect, name)
        if len(found) > 1:
            names = " and ".join(mask.name for mask in found)
            self.faults.append((path, f"has several masks: {names}"))
        elif masks.any and not found:
            where = f"in {MASKS}/{defect}, with or without _mask behind it"
            self.faults.append((path, f"{UNMASKED} {where}, unlike others"))
        else:
            mask = found[0] if found else None
            key = key_of(folder, path)
            self.records.append(Record(key, path, Split.TEST, folder.name, None, defect, 1, mask))


class Masks:
    """The mask files of a category, by defect type and name."""

    def __init__(self, folder: Path) -> None:
        self.types = {inner.name for inner in folders(folder)} - {GOOD}
        self.left: dict[tuple[str, PurePath], list[Path]] = {}
        """Masks that no image has asked for yet, by defect type and path without suffix."""
        for defect in sorted(self.types):
            for path in images(folder / defect):
                name = path.relative_to(folder / defect).with_suffix("")
                self.left.setdefault((defect, name), []).append(path)
        self.any = bool(self.left)

    def take(self, defect: str, name: PurePath) -> list[Path]:
        """The masks of an image: of the same name, or with _mask behind it."""
        names = (name, name.with_name(f"{name.name}_mask"))
        return [path for each in names for path in self.left.pop((defect, each), [])]


def images(folder: Path) -> Iterator[Path]:
    """The image files below a folder, at any depth, in an order that no machine changes."""
    for path, inner, names in os.walk(folder, onerror=_refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(path, name) for name in sorted(names) if is_image(name))


def choose(held: Sequence[str], categories: Sequence[str] | None, root: Path) -> set[str]:
    """The wanted ones of the categories that `root` holds.

    Raises:
        UsageError: one is asked for that is not there.
    """
    if unknown := sorted(set(categories or ()) - set(held)):
        raise UsageError(
            f"{root} holds no category {', '.join(unknown)}", f"choose from: {', '.join(held)}"
        )
    return set(held if categories is None else categories)


def is_image(name: str) -> bool:
    return not name.startswith(".") and PurePath(name).suffix.lower() in DECODED | REFUSED


def folders(folder: Path) -> list[Path]:
    """The folders directly in a folder, which need not exist; hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def key_of(category: Path, path: Path) -> str:
    return make_key(path.relative_to(category.parent))


def make_key(path: PurePath) -> str:
    """The key of an image from its path, counted from the category's folder on."""
    key = "/".join(_escape(part) for part in path.with_suffix("").parts)
    # webdataset leaves out the members of a folder named __like_this__.
    return f"%5F{key[1:]}" if key.startswith("__") else key


def _escape(text: str) -> str:
    """Dots, at which webdataset splits, and what cannot be printed become %XX, one to one."""
    return "".join(
        char
        if char.isprintable() and char not in ".%\\"
        else "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in text
    )


def _refuse(error: OSError) -> None:
    raise error
