"""The verbs that make and check shards."""

from pathlib import Path
from typing import Annotated

import typer

from kdad_dist.cli.choices import Json, Layout, Resize
from kdad_dist.cli.text import answer, say, summary, tell
from kdad_dist.errors import DataError


def pack(
    root: Annotated[
        Path, typer.Argument(readable=False, help="A folder of images; it is never changed.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder for the shards.")],
    layout: Annotated[Layout, typer.Option(help="How the folder is arranged.")] = Layout.AUTO,
    category: Annotated[
        list[str] | None, typer.Option(help="Only this category; may be repeated.")
    ] = None,
    size: Annotated[int, typer.Option(min=0, help="Resize to this; 0: keep the files.")] = 256,
    resize: Annotated[
        Resize, typer.Option(help="Squash to a square, or keep the aspect ratio.")
    ] = Resize.SQUASH,
    workers: Annotated[int, typer.Option(min=0, help="0: one per core.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List damaged files and go on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pack a folder of images into shards with an index."""
    from dataclasses import asdict

    from kdad_dist.data.writer import pack as pack_folder
    from kdad_dist.runtime.progress import progress

    with progress("packing", 1, "images") as bar:
        result = pack_folder(
            root,
            out,
            layout=layout.value,
            categories=category,
            size=size,
            mode=resize.value,
            workers=workers or None,
            skip_bad=skip_bad,
            progress=bar.at,
        )
    tell(summary(asdict(result)), asdict(result), as_json)


def verify(
    shards: Annotated[str, typer.Argument(help="The folder that `kdad pack` wrote.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too.")] = False,
    as_json: Json = False,
) -> None:
    """Check counts, hashes and, on request, images; exit 1 names every fault."""
    from kdad_dist.data.verify import verify as verify_shards
    from kdad_dist.runtime.progress import progress

    with progress("verifying", 1, "shards") as bar:
        faults = verify_shards(shards, decode, bar.at)
    if as_json:
        answer({"shards": shards, "faults": faults})
    for fault in faults:
        say(fault)
    if faults:
        number = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise DataError(f"{shards} has {number}", "copy it again, or pack it again")
    say(f"{shards} is sound")
