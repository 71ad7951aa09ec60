"""Manifests of checkpoints: what a directory must hold, to the byte, before any of it is used."""

import hashlib
import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdad_dist.errors import CheckpointError
from kdad_dist.files import sync_directory, write_text
from kdad_dist.runtime.progress import Progress, progress

log = logging.getLogger(__name__)
VERSION = 1
MANIFEST = "manifest.json"
LAST_STEP = 10**8 - 1
PIECE = 2**20
"""Bytes that are read at once."""
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Entry:
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Body:
    """What a manifest says at least. A file lies in the directory, or in a folder of it."""

    format: str
    step: Annotated[int, Field(ge=0, le=LAST_STEP)]
    samples_seen: Count
    metrics: dict[str, float]
    identity: dict[str, str]
    files: dict[str, Entry]


_BODY = TypeAdapter(Body)


def step_name(step: int) -> str:
    """The name of a step's directory; names sort as steps do."""
    assert 0 <= step <= LAST_STEP, step
    return f"step_{step:08d}"


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: it is missing, altered, of another version, or names files elsewhere.
    """
    file = own_file(path, MANIFEST)
    try:
        raw = file.read_bytes()
        body = json.loads(raw)
        intact = isinstance(body, dict) and render(body).encode() == raw
        version = body["version"] if intact else None
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint at {path}: {MANIFEST} is missing",
            "give a directory that `kdad train` wrote; delete this one if it is of no use",
        ) from error
    except (ValueError, KeyError, RecursionError) as error:
        raise damaged(file, f"it is not readable as JSON ({error})") from error
    if not intact:
        raise damaged(file, "it does not match its own sha256")
    if version != VERSION:
        raise CheckpointError(
            f"{file} has version {version}; this program reads version {VERSION}",
            "use the version of kdad_dist that wrote it",
        )
    try:
        _BODY.validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(file, f"it says of {place}: {first['msg']}") from None
    outside = [name for name in body["files"] if not re.fullmatch(r"(\w+/)?\.?\w[\w.]*", name)]
    if outside:
        raise damaged(file, f"it names a file outside of its directory, {outside[0]!r}")
    if path.name != step_name(body["step"]):
        raise damaged(file, f"it is of step {body['step']}, unlike its directory")
    return body


def replace_manifest(path: Path, body: dict[str, Any]) -> None:
    """Writes the manifest, flushed to the disk, in one move."""
    write_text(path / MANIFEST, render(body))
    sync_directory(path)


def render(body: dict[str, Any]) -> str:
    """The only text that a manifest of this content may have: its sha256 stands in it."""
    content = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True)


def file_entry(file: Path, bar: Progress | None = None) -> dict[str, Any]:
    """Size and hash of a file, as they stand in a manifest.

    Args:
        bar: counts pieces of `PIECE` bytes.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            if bar is not None:
                bar.advance()
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def verify(
    path: Path, share: int = 0, shares: int = 1, content: bool = True, shown: bool = False
) -> None:
    """Reads the manifest and every `shares`-th of its files, beginning with number `share`.

    Args:
        content: whether files are read; otherwise only their sizes are compared.
        shown: whether it is shown how far that is, where it takes long.

    Raises:
        CheckpointError: a file is missing or differs from the manifest by as much as a bit.
    """
    files = read_manifest(path)["files"]
    names = sorted(files)[share::shares]
    pieces = sum(-(-files[name]["bytes"] // PIECE) for name in names)
    with progress(f"reading {path.name}", pieces, "MiB", visible=shown, brief=True) as bar:
        for name in names:
            file, expected = own_file(path, name), files[name]
            try:
                size = file.stat().st_size
                if size != expected["bytes"]:
                    raise damaged(file, f"it holds {size} bytes instead of {expected['bytes']}")
                if content and file_entry(file, bar) != expected:
                    raise damaged(file, "its content does not match its sha256")
            except FileNotFoundError as error:
                raise damaged(file, "it is missing") from error


def own_file(path: Path, name: str) -> Path:
    """A file of a checkpoint, missing perhaps.

    Raises:
        CheckpointError: it is a link, which may lead anywhere, or a device, which may not end.
    """
    file = path / name
    if file.resolve() != path.resolve() / name or (file.exists() and not file.is_file()):
        raise damaged(file, "it is a link, folder, pipe or device, not a file of this checkpoint")
    return file


def damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged: {fault}",
        f"delete {file.parent}; training then goes on from the checkpoint before it",
    )


def partial_name(path: Path) -> Path:
    """A fresh hidden name beside `path`, for a directory being written or being deleted."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def delete(path: Path) -> None:
    """Deletes a checkpoint; killed half-way, it leaves nothing that looks like one."""
    shutil.rmtree(path.rename(partial_name(path)))


def delete_partials(directory: Path) -> None:
    for partial in directory.glob(f".{step_name(0)[:5]}*.partial"):
        shutil.rmtree(partial)


def published(directory: Path) -> list[Path]:
    """Directories with a checkpoint's name, oldest first."""
    return sorted(path for path in directory.glob("step_" + "[0-9]" * 8) if path.is_dir())


def first_sound(paths: Iterable[Path]) -> Path | None:
    """The first checkpoint whose files are what its manifest says; broken ones are reported."""
    return next((path for path in paths if is_sound(path)), None)


def is_sound(path: Path) -> bool:
    try:
        verify(path, shown=True)
    except CheckpointError as error:
        log.warning("passing over a checkpoint: %s", error)
        return False
    return True


def ranked(paths: Iterable[Path]) -> list[Path]:
    """Those with a finite `val_loss`, the lowest first, the earlier of equals first."""
    found = []
    for path in paths:
        try:
            loss = read_manifest(path)["metrics"].get("val_loss", math.nan)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            continue
        if math.isfinite(loss):
            found.append((loss, path.name, path))
    return [path for *_, path in sorted(found)]
