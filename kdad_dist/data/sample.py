"""One sample of a shard folder: an image, where its bytes are, and what is known of it."""

from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    TRAIN = "train"
    VAL = "val"
    """Never on disk: carved out of the training samples when they are selected."""
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a tar: its extension, and where its bytes lie in the shard."""

    ext: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with what is known of it."""

    key: str
    split: Split
    category: str
    class_name: str | None
    defect_type: str | None
    gt_label: int | None
    """0 normal, 1 anomalous; None for a folder of classes, until one is chosen as normal. Where
    classes are told apart (`data.classes`): the place of the image's own among them."""
    shard: str
    image: Member
    mask: Member | None
