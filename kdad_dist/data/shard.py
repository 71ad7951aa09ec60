"""One shard: reads its images, makes them the stored size, writes the tar and says where all lies.

A shard is a pure function of its images and the options, so that a finished one is known again by
the hash of its sources. It appears under its name only when it is whole and on the disk.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdad_dist.data.image import (
    Resize,
    decode_mask,
    load_image,
    read_file,
    resize_mask,
    resized,
)
from kdad_dist.data.index import Sample, Shard, Split, parse_sample
from kdad_dist.data.partition import ShardPlan
from kdad_dist.data.records import Record
from kdad_dist.data.sample import Member
from kdad_dist.errors import DataError
from kdad_dist.files import write_bytes

PNG = {"compress_level": 2, "compress_type": zlib.Z_RLE}
"""Of 256-pixel photographs, the default level 6 writes 4 to 8 times as long, for files of about the
same size. Runs alone, instead of a search for matches, are 15 % smaller, quicker to write and 10 %
quicker to read: after the filters there are few matches in a photograph."""
PARTIAL = ".partial"
"""Folder inside the shard folder for what is not finished; it goes when the index is written."""
Content = bytes | OSError | None
"""What reading a file gave; None where there is no file to read."""


@dataclass(frozen=True)
class Options:
    """How images are stored."""

    root: Path
    size: int
    """Side, or shorter side; 0 keeps the bytes of the files."""
    mode: Resize
    skip_bad: bool


@dataclass(frozen=True)
class Packed:
    """A shard that lies finished in the shard folder."""

    source: str
    """Hash of what it was made from."""
    shard: Shard
    samples: list[Sample]
    skipped: list[tuple[str, str]]
    """Files left out, relative to the root, with the reason."""


class Stopped(Exception):
    """Another shard has failed, or the user has interrupted."""


def write_shard(plan: ShardPlan, out: Path, options: Options, tick: Callable[[], None]) -> Packed:
    """Writes the shard and, before it takes its name, a note of its content beside it.

    Args:
        tick: called after each image; may raise `Stopped`.

    Raises:
        DataError: an image is bad (unless bad ones are skipped).
        OSError: the disk refuses.
    """
    temporary = out / PARTIAL / f"{plan.file}.tmp"
    try:
        with open(temporary, "wb") as file:
            source, kept, skipped = _fill(file, plan, options, tick)
            file.flush()
            os.fsync(file.fileno())
        packed = _describe(temporary, plan, kept, source, skipped)
        write_bytes(note_of(out, plan.file), json.dumps(asdict(packed)).encode())
        temporary.replace(out / plan.file)
    finally:
        temporary.unlink(missing_ok=True)
    return packed


def finished(plan: ShardPlan, out: Path, options: Options) -> Packed | None:
    """The shard as an earlier call left it, if it is whole and of the same images.

    The caller has made sure that the earlier options for sizes were the same.
    """
    try:
        packed = _noted(json.loads(note_of(out, plan.file).read_bytes()))
        with open(out / plan.file, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == packed.shard.sha256
    except (OSError, ValueError, TypeError, LookupError):  # it is not there, or is no such note
        return None
    if not whole or (packed.skipped and not options.skip_bad):
        return None
    return packed if packed.source == source_of(plan.records) else None


def _noted(note: Any) -> Packed:
    """What a note says, as it was written."""
    return Packed(
        source=note["source"],
        shard=Shard(**{**note["shard"], "split": Split(note["shard"]["split"])}),
        samples=[parse_sample(row) for row in note["samples"]],
        skipped=[(file, reason) for file, reason in note["skipped"]],
    )


def note_of(out: Path, file: str) -> Path:
    return out / PARTIAL / f"{file}.json"


def source_of(records: Sequence[Record]) -> str:
    """Hash of the files behind the records and of what is known of them."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_source_line(record, *_contents(record)))
    return digest.hexdigest()


def _fill(
    file: io.BufferedWriter, plan: ShardPlan, options: Options, tick: Callable[[], None]
) -> tuple[str, list[tuple[Record, str]], list[tuple[str, str]]]:
    """The source hash; the records that were written, with their extension; what was skipped."""
    from webdataset.writer import (
        TarWriter,
    )  # brings torch: not for those who look at a command's help

    digest, kept, skipped = hashlib.sha256(), [], []
    # Whoever packs, whenever: the same bytes.
    nobody = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
    with TarWriter(file, **nobody, compress=False, encoder=False) as tar:
        for record in plan.records:
            image, mask = _contents(record)
            digest.update(_source_line(record, image, mask))
            try:
                members = _encode(record, image, mask, options)
            except DataError as error:
                if not options.skip_bad:
                    raise
                reason = error.problem.replace(f"{options.root}{os.sep}", "")
                skipped.append((str(record.path.relative_to(options.root)), reason))
            else:
                for ext, content in members.items():
                    tar.write({"__key__": record.key, ext: content})
                kept.append((record, next(iter(members))))
            tick()
    return digest.hexdigest(), kept, skipped


def _encode(record: Record, image: Content, mask: Content, options: Options) -> dict[str, bytes]:
    """The members of a sample by extension, the image first.

    Raises:
        DataError: names the file that is bad.
    """
    for path, content in ((record.path, image), (record.mask, mask)):
        if isinstance(content, OSError):
            raise DataError(
                f"{path} cannot be read: {content.strerror}", "make it readable, or leave it out"
            )
    assert isinstance(image, bytes)
    if record.pixels is None:
        picture, ext = load_image(image, str(record.path))
    else:
        picture, ext = Image.fromarray(record.pixels), "png"
    width, height = picture.size
    if options.size:
        try:
            picture = resized(picture, options.size, options.mode)
        except DataError as error:
            raise DataError(f"{record.path}: {error.problem}", error.remedy) from None
    if options.size or record.pixels is not None:
        image, ext = _png(picture), "png"
    members = {ext: image}
    if isinstance(mask, bytes):
        area = decode_mask(mask, str(record.mask))
        _check_mask(record, area.shape, (height, width), bool(area.any()))
        if record.gt_label:
            area = resize_mask(area, picture.height, picture.width)
            members["mask.png"] = _png(Image.fromarray(area.astype(np.uint8) * 255))
    members["json"] = json.dumps(facts(record), sort_keys=True, ensure_ascii=False).encode()
    return members


def _check_mask(
    record: Record, found: tuple[int, ...], wanted: tuple[int, int], marked: bool
) -> None:
    if found != wanted:
        raise DataError(
            f"{record.mask} is a mask of {found[1]} x {found[0]} pixels, but its image "
            f"{record.path} has {wanted[1]} x {wanted[0]} as it is shown, upright",
            "draw the mask on the upright image at its full size",
        )
    if marked != bool(record.gt_label):
        raise DataError(
            f"{record.mask} marks {'some' if marked else 'no'} pixels of the "
            f"{'defective' if record.gt_label else 'normal'} image {record.path}",
            "mend the mask, or move the image to where it belongs",
        )


def _describe(
    tar: Path,
    plan: ShardPlan,
    kept: Sequence[tuple[Record, str]],
    source: str,
    skipped: list[tuple[str, str]],
) -> Packed:
    """Reads the finished tar as a reader will: offsets and hashes are those of the disk."""
    with open(tar, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        members: dict[str, Member] = {}
        with tarfile.open(fileobj=file) as archive:
            for info in archive:
                content = archive.extractfile(info)
                assert content is not None
                digest = hashlib.sha256(content.read()).hexdigest()
                ext = info.name.rsplit("/", 1)[-1].split(".", 1)[1]
                members[info.name] = Member(ext, info.offset_data, info.size, digest)
    samples = [
        Sample(
            key=record.key,
            shard=plan.file,
            image=members[f"{record.key}.{ext}"],
            mask=members.get(f"{record.key}.mask.png"),
            split=record.split,
            category=record.category,
            class_name=record.class_name,
            defect_type=record.defect_type,
            gt_label=record.gt_label,
        )
        for record, ext in kept
    ]
    return Packed(source, Shard(plan.file, sha256, size, len(kept), plan.split), samples, skipped)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    # Without this, Pillow would copy the colour profile of the file, which nothing here applies.
    image.save(stream, "PNG", **PNG, icc_profile=None)
    return stream.getvalue()


def facts(sample: Record | Sample) -> dict[str, str | int | None]:
    """What the json member of a sample says."""
    return {
        "category": sample.category,
        "split": sample.split,
        "class_name": sample.class_name,
        "defect_type": sample.defect_type,
        "gt_label": sample.gt_label,
    }


def _contents(record: Record) -> tuple[Content, Content]:
    """The bytes of the image (bare pixels, where it has no file of its own) and of the mask."""
    image = _read(record.path) if record.pixels is None else record.pixels.tobytes()
    return image, _read(record.mask)


def _read(path: Path | None) -> Content:
    try:
        return read_file(path) if path else None
    except OSError as error:
        return error


def _source_line(record: Record, image: Content, mask: Content) -> bytes:
    hashes = [
        hashlib.sha256(content).hexdigest()
        if isinstance(content, bytes)
        else type(content).__name__
        for content in (image, mask)
    ]
    return json.dumps([record.key, facts(record), hashes]).encode() + b"\n"
