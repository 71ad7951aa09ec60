"""What options of the verbs may be."""

from enum import StrEnum


class Layout(StrEnum):
    AUTO = "auto"
    MVTEC = "mvtec"
    VISA = "visa"
    FOLDER = "folder"
    CLASSES = "classes"


class Resize(StrEnum):
    SQUASH = "squash"
    SHORTER = "shorter"


class Mode(StrEnum):
    DDP = "ddp"
    FSDP2 = "fsdp2"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Format(StrEnum):
    SAFETENSORS = "safetensors"
