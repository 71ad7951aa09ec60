"""What arguments and options of the verbs may be."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def recipes(incomplete: str) -> list[str]:
    """The shipped recipes that begin so, for a shell that completes; it knows files by itself."""
    from kdad_dist.config.load import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def shipped_variants(incomplete: str) -> list[str]:
    """The shipped lists of variants that begin so."""
    from kdad_dist.sweep.variants import variant_names

    return [name for name in variant_names() if name.startswith(incomplete)]


Run = Annotated[Path, typer.Argument(help="The directory that `kdad train` wrote.")]
Config = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or a shipped recipe such as stfpm_mvtec.", autocompletion=recipes
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the configuration: key.subkey=value ...")
]
Variants = Annotated[
    str | None,
    typer.Option(
        help="Instead of classes: a YAML file of variants, or a shipped one's name.",
        autocompletion=shipped_variants,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


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
    ONNX = "onnx"
    TORCH = "torch"
