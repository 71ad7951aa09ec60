"""`verify`: whether a shard folder is what its index says, and if not, what exactly is wrong."""

import hashlib
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from kdad_dist.data.image import decode_image, decode_mask
from kdad_dist.data.index import INDEX_FILE, Index, Sample, Shard, count, parse_index
from kdad_dist.data.sample import Member
from kdad_dist.data.shard import PARTIAL, facts
from kdad_dist.data.source import FolderMissing, fetch, is_remote
from kdad_dist.errors import DataError


def verify(
    root: str, decode: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Every fault of the shards at a folder or http address, each naming its shard or key.

    Args:
        decode: decode every image and mask too, which takes far longer than hashing.
        progress: called with the shards done and all shards.

    Raises:
        FolderMissing: there is no such folder.
    """
    try:
        index = Index.read(root)
        described = parse_index(fetch(root, INDEX_FILE), root)
    except FolderMissing:
        raise
    except DataError as error:
        return [error.problem]
    held: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in index.samples:
        held[sample.shard].append(sample)
    faults = [*_index_faults(index, described.get("counts", {}), held), *_folder_faults(index)]

    def check(shard: Shard) -> list[str]:
        return list(_shard_faults(index, shard, held[shard.file], decode))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done, found in enumerate(pool.map(check, index.shards), start=1):
            faults += found
            if progress is not None:
                progress(done, len(index.shards))
    return faults


def _index_faults(
    index: Index, counts: dict[str, dict[str, dict[str, int]]], held: dict[str, list[Sample]]
) -> Iterator[str]:
    """Where the index contradicts itself."""
    if counts != count(index.samples):
        yield f"{INDEX_FILE} counts {counts}, but its samples are {count(index.samples)}"
    keys = Counter(sample.key for sample in index.samples)
    yield from (f"{key} is the key of {n} samples" for key, n in keys.items() if n > 1)
    for file in sorted(held.keys() - {shard.file for shard in index.shards}):
        yield f"{file} holds {held[file][0].key}, but is not listed in {INDEX_FILE}"
    for shard in index.shards:
        if len(held[shard.file]) != shard.samples:
            yield f"{shard.file} should hold {shard.samples} samples, not {len(held[shard.file])}"
        if any(sample.split != shard.split for sample in held[shard.file]):
            yield f"{shard.file} holds samples of another split than {shard.split}"


def _folder_faults(index: Index) -> Iterator[str]:
    """Files that the index knows nothing of."""
    if is_remote(index.root):
        return
    listed = {shard.file for shard in index.shards}
    try:
        paths = sorted(Path(index.root).iterdir())
    except OSError as error:
        yield f"{index.root} cannot be listed: {error.strerror}"
        return
    for path in paths:
        if path.name == PARTIAL:
            yield f"{path.name} was left by a pack that was killed; pack again to remove it"
        elif path.suffix == ".tar" and path.name not in listed:
            yield f"{path.name} is a shard that is not listed in {INDEX_FILE}"


def _shard_faults(
    index: Index, shard: Shard, samples: Sequence[Sample], decode: bool
) -> Iterator[str]:
    try:
        data = fetch(index.root, shard.file, max(shard.bytes for shard in index.shards))
    except DataError as error:
        yield f"{shard.file} is missing or unreadable: {error.problem}"
        return
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        other = next((other.file for other in index.shards if other.sha256 == digest), None)
        if other:
            yield f"{shard.file} holds the content of {other}"
            return
        if len(data) != shard.bytes:
            yield f"{shard.file} has {len(data)} bytes, not {shard.bytes}"
        yield f"{shard.file} has the sha256 {digest}, not {shard.sha256}"
    yield from (f"{shard.file}: {fault}" for fault in _tar_faults(data, samples))
    for sample in samples:
        for member in (sample.image, sample.mask):
            content = data[member.offset : member.offset + member.size] if member else b""
            if member and hashlib.sha256(content).hexdigest() != member.sha256:
                yield f"{shard.file}: {sample.key}.{member.ext} does not match its sha256"
        if decode:
            yield from _pixel_faults(index, sample, data)


def _tar_faults(data: bytes, samples: Sequence[Sample]) -> Iterator[str]:
    """Members of the tar that are not where, or what, the samples say."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            for info in tar:
                if info.name in found:
                    yield f"{info.name} is there twice"
                found[info.name] = (info.offset_data, info.size)
    except (tarfile.TarError, ValueError, EOFError) as error:
        yield f"cannot be read as a tar: {error}"
        return
    for sample in samples:
        offset, size = found.pop(f"{sample.key}.json", (0, 0))
        if _facts_in(data[offset : offset + size]) != facts(sample):
            yield f"{sample.key}.json is missing or contradicts the index"
        for member in (sample.image, sample.mask):
            if member and found.pop(f"{sample.key}.{member.ext}", None) != _place(member):
                yield f"{sample.key}.{member.ext} is not where the index says"
    yield from (f"{name} is not listed in the index" for name in found)


def _place(member: Member) -> tuple[int, int]:
    return member.offset, member.size


def _facts_in(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _pixel_faults(index: Index, sample: Sample, data: bytes) -> Iterator[str]:
    def content(member: Member) -> bytes:
        return data[member.offset : member.offset + member.size]

    try:
        height, width = decode_image(content(sample.image), sample.key).shape[:2]
        if sample.mask:
            mask = decode_mask(content(sample.mask), f"the mask of {sample.key}")
            if index.image_size and mask.shape != (height, width):
                yield f"{sample.shard}: {sample.key} has a mask of another size"
    except DataError as error:
        yield f"{sample.shard}: {error.problem}"
        return
    sides = {height, width} if index.resize == "squash" else {min(height, width)}
    if index.image_size and sides != {index.image_size}:
        yield f"{sample.shard}: {sample.key} has {width} x {height} pixels, not {index.image_size}"
