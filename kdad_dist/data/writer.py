"""`pack`: a folder of images becomes a folder of shards with an index; the images stay untouched.

Finished shards take their names one by one; the index comes last, so that a folder without one is
unfinished. A call that was killed is taken up by the next one; a finished folder is left alone.
Threads, not processes: Pillow and hashing let go of the interpreter's lock, both were equally fast,
and nothing survives a killed pack to write on beside its successor.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdad_dist.data.claim import claimed, drop_stale
from kdad_dist.data.image import Resize
from kdad_dist.data.index import INDEX_FILE, SAMPLES_FILE, Index, describe, parse_index
from kdad_dist.data.layouts import scan
from kdad_dist.data.partition import ShardPlan, partition
from kdad_dist.data.records import MASKS, UNMASKED, Layout, Scan
from kdad_dist.data.shard import (
    PARTIAL,
    Options,
    Packed,
    Stopped,
    finished,
    source_of,
    write_shard,
)
from kdad_dist.errors import DataError
from kdad_dist.files import sync_directory, write_bytes
from kdad_dist.wording import amount

SHOWN = 5
"""Files named in one message."""

Progress = Callable[[int, int], None]
"""Called with the images done and all images, from the thread that called `pack`."""


@dataclass(frozen=True)
class PackResult:
    """What `pack` did."""

    out: str
    layout: str
    reason: str
    """Why it is this layout."""
    images: int
    shards: int
    counts: dict[str, dict[str, dict[str, int]]]
    """By split, category, and class or defect type ("good": none)."""
    fingerprint: str
    unchanged: bool
    """The folder was already finished; nothing was done."""
    resumed: int
    """Shards that an earlier, unfinished call had left."""
    skipped: list[tuple[str, str]]
    """Bad files that were left out, with the reason."""
    unused: list[str]
    """Folders with images for which the layout has no use."""


def pack(
    root: Path,
    out: Path,
    *,
    layout: Layout | Literal["auto"] = "auto",
    categories: Sequence[str] | None = None,
    size: int = 256,
    mode: Resize = "squash",
    workers: int | None = None,
    samples_per_shard: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs the images below `root` into the new, unfinished or already finished folder `out`.

    The bytes of the result depend on the images and options alone, not on `workers`.

    Args:
        size: side, or shorter side, of the stored images in pixels; 0 keeps the files' bytes.
        workers: threads; None: one for each core.
        samples_per_shard: None: chosen so that several readers can stream a category.
        skip_bad: leave bad files out and list them, instead of stopping at the first; not those
            that hold many images.

    Raises:
        DataError: an image, a mask or `root` is bad, `out` holds something else or cannot be
            written. What `out` held before is still there.
        UsageError: a category is asked for that is not there.
    """
    found = scan(root, layout, categories)
    _refuse_overlap(found.root, out)
    if found.faults and (found.published or not skip_bad):
        raise _refusal(found)
    try:
        plans = list(partition(found.records, size, samples_per_shard))
        parameters = {
            "layout": found.layout,
            "image_size": size or None,
            "resize": mode,
            "samples_per_shard": samples_per_shard,
        }
        if not (out / INDEX_FILE).exists():
            with claimed(out, {"root": str(found.root), **parameters}):
                # Another process may have finished it meanwhile.
                if not (out / INDEX_FILE).exists():
                    options = Options(found.root, size, mode, skip_bad)
                    return _pack(found, out, plans, parameters, options, workers, progress)
        return _unchanged(found, out, plans, parameters, skip_bad, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or out} cannot be read or written: {error.strerror}",
            "give it room and permission, or choose another OUT; the same command then goes on",
        ) from None


def _pack(
    found: Scan,
    out: Path,
    plans: Sequence[ShardPlan],
    parameters: dict[str, Any],
    options: Options,
    workers: int | None,
    progress: Progress | None,
) -> PackResult:
    drop_stale(out, {plan.file for plan in plans})
    made = _write_shards(plans, out, options, workers, progress)
    packed = [each for each, _ in made]
    skipped = sorted(_faults(found) + [skip for each in packed for skip in each.skipped])
    samples = [sample for each in packed for sample in each.samples]
    if not samples:
        raise DataError(
            f"{found.root} holds no usable image; {len(skipped)} were skipped, the first because "
            f"{skipped[0][1]}",
            "mend the files",
        )
    for each in packed:
        if not each.samples:
            (out / each.shard.file).unlink()
    samples.sort(key=lambda sample: (sample.category, sample.split, sample.key))
    shards = [each.shard for each in packed if each.samples]
    source = _source(found, [each.source for each in packed])
    index, lines = describe(parameters, shards, samples, skipped, source)
    write_bytes(out / SAMPLES_FILE, lines, out / PARTIAL)
    sync_directory(out)  # the names of the shards, before the index vouches for them
    write_bytes(out / INDEX_FILE, index, out / PARTIAL)
    sync_directory(out)
    return _result(found, out, resumed=sum(old for _, old in made))


def _unchanged(
    found: Scan,
    out: Path,
    plans: Sequence[ShardPlan],
    parameters: dict[str, Any],
    skip_bad: bool,
    progress: Progress | None,
) -> PackResult:
    """Says that `out` holds the very data already.

    Raises:
        DataError: it holds other data; says what differs.
    """
    index = Index.read(str(out))
    described = parse_index((out / INDEX_FILE).read_bytes(), str(out))
    skipped = {skip["file"] for skip in described.get("skipped", [])}
    kept = [r for r in found.records if str(r.path.relative_to(found.root)) not in skipped]
    wanted = {**parameters, "categories": sorted({record.category for record in kept})}
    differences = [
        f"{key} is {described.get(key)}, not {value}"
        for key, value in wanted.items()
        if described.get(key) != value
    ]
    if skipped and not skip_bad:
        differences.append(f"{amount(len(skipped), 'bad file was', 'bad files were')} skipped")
    now, before = {record.key for record in kept}, {sample.key for sample in index.samples}
    for keys, what in ((now - before, "new"), (before - now, "gone")):
        if keys and not differences:
            number = amount(len(keys), "image is", "images are")
            differences.append(f"{number} {what}, such as {min(keys)}")
    if not differences and described.get("source_sha256") != _source_now(found, plans, progress):
        differences.append("the content or the label of an image or mask has changed")
    if differences:
        raise DataError(
            f"{out} holds another data set: {'; '.join(differences)}",
            "choose another OUT, or remove this one",
        )
    for shard in index.shards:
        if not (out / shard.file).is_file() or (out / shard.file).stat().st_size != shard.bytes:
            raise DataError(f"{out / shard.file} is damaged or gone", f"remove {out}, pack again")
    shutil.rmtree(out / PARTIAL, ignore_errors=True)  # a kill right after the index left it
    return _result(found, out, unchanged=True)


def _write_shards(
    plans: Sequence[ShardPlan],
    out: Path,
    options: Options,
    workers: int | None,
    progress: Progress | None,
) -> list[tuple[Packed, bool]]:
    """Writes the missing shards, several at a time; says of each whether it was there already."""
    total = sum(len(plan.records) for plan in plans)
    done, count, stop = 0, threading.Lock(), threading.Event()

    def tick(images: int = 1) -> None:
        nonlocal done
        with count:
            done += images
        if stop.is_set():
            raise Stopped

    def make(plan: ShardPlan) -> tuple[Packed, bool]:
        if old := finished(plan, out, options):
            tick(len(plan.records))
            return old, True
        return write_shard(plan, out, options, tick), False

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(make, plan) for plan in plans]
        try:
            pending = set(jobs)
            while pending:
                ended, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                if progress:
                    progress(done, total)
                for job in ended:
                    job.result()
        finally:  # also after an error, or Ctrl-C
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [job.result() for job in jobs]


def _refusal(found: Scan) -> DataError:
    """What stops a pack, with the files of a folder that have the same fault said as one."""
    alike: dict[tuple[Path, str], list[Path]] = {}
    for path, reason in found.faults:
        alike.setdefault((path.parent, reason), []).append(path)
    named = [
        f"{first}{f' (and {len(more)} more in its folder)' if more else ''} {reason}"
        for (_, reason), (first, *more) in alike.items()
    ]
    left = f"; and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    remedy = "mend or remove them, or leave them out with --skip-bad"
    if found.published:
        remedy = "fetch what is named again, complete: --skip-bad leaves out no such file"
    if any(reason.startswith(UNMASKED) for _, reason in found.faults):
        remedy += f"; masks are for all defects or for none: complete {MASKS}/, or move it away"
    return DataError("; ".join(named[:SHOWN]) + left, remedy)


def _faults(found: Scan) -> list[tuple[str, str]]:
    return [(str(path.relative_to(found.root)), reason) for path, reason in found.faults]


def _source(found: Scan, shards: Sequence[str]) -> str:
    """Hash of everything that the shards were made from, and of what could not be used."""
    return hashlib.sha256(json.dumps([_faults(found), list(shards)]).encode()).hexdigest()


def _source_now(found: Scan, plans: Sequence[ShardPlan], progress: Progress | None) -> str:
    """The same of the files as they are, which are read again."""
    sources, done = [], 0
    for plan in plans:
        sources.append(source_of(plan.records))
        done += len(plan.records)
        if progress:
            progress(done, len(found.records))
    return _source(found, sources)


def _result(found: Scan, out: Path, unchanged: bool = False, resumed: int = 0) -> PackResult:
    described = parse_index((out / INDEX_FILE).read_bytes(), str(out))
    return PackResult(
        out=str(out),
        layout=found.layout,
        reason=found.reason,
        images=sum(shard["samples"] for shard in described["shards"]),
        shards=len(described["shards"]),
        counts=described["counts"],
        fingerprint=described["fingerprint"],
        unchanged=unchanged,
        resumed=resumed,
        skipped=[(skip["file"], skip["reason"]) for skip in described["skipped"]],
        unused=[str(folder) for folder in found.unused],
    )


def _refuse_overlap(root: Path, out: Path) -> None:
    inner, outer = out.resolve(), root.resolve()
    if inner.is_relative_to(outer):
        raise DataError(
            f"OUT ({out}) lies in ROOT ({root}), which is never changed",
            "choose a folder outside of it",
        )
