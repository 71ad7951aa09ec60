"""One sample of a shard folder: an image, where its bytes are, and what is known of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field

from kdad_dist.data.image import MAX_BYTES


def _key(name: str) -> str:
    """A key, or a part of one, of which names of files are made."""
    if "\0" in name or not all(part.strip(".") for part in name.split("/")):
        raise ValueError("it is not a path of plain names")
    return name


def _part(name: str) -> str:
    if "/" in name:
        raise ValueError("it is not a plain name")
    return _key(name)


# Checked where an index is read: anybody may have written that.
Key = Annotated[str, AfterValidator(_key)]
Part = Annotated[str, AfterValidator(_part)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Split(StrEnum):
    TRAIN = "train"
    VAL = "val"
    """Never on disk: carved out of the training samples when they are selected."""
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a tar: its extension, and where its bytes lie in the shard."""

    ext: str
    offset: Count
    size: Annotated[int, Field(ge=0, le=MAX_BYTES)]
    sha256: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with what is known of it."""

    key: Key
    split: Split
    category: Part
    class_name: str | None
    defect_type: str | None
    gt_label: int | None
    """0 normal, 1 anomalous; None for a folder of classes, until one is chosen as normal. Where
    classes are told apart (`data.classes`): the place of the image's own among them."""
    shard: Part
    image: Member
    mask: Member | None
