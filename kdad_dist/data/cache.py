"""Arrays that are computed once per node and then shared, as memory-mapped files, by all processes.

Nothing here is ever deleted by itself: the cache folder may be removed whenever no run uses it.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kdad_dist.errors import DataError
from kdad_dist.files import locked
from kdad_dist.types import Poll, go_on

log = logging.getLogger(__name__)

VERSION = 1
ASK_EVERY = 0.05
"""Seconds between two attempts at a lock that another process holds."""
ELSEWHERE = (
    "set KDAD_CACHE to a folder on a disk with more room, or do without the cache "
    "(data.cache=none, method.cache_teacher=false)"
)


def cache_root() -> Path:
    """The folder of all caches: KDAD_CACHE, or ~/.cache/kdad_dist."""
    return Path(os.environ.get("KDAD_CACHE") or Path.home() / ".cache" / "kdad_dist")


def filled_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    fill: Callable[[NDArray[Any]], None],
    description: str,
    poll: Poll = go_on,
) -> NDArray[Any]:
    """A read-only array that `fill` computed, now or in an earlier call, here or elsewhere.

    The array lives in the directory `path`, whose manifest appears only when it is complete. One
    process fills it, others wait. Whoever is killed leaves nothing that a later call would trust.
    All processes of a node share one copy of its pages.

    Args:
        fill: writes every element of the array it is given; called at most once.
        description: what the array holds, for messages.
        poll: called while another process fills the array; `fill` calls it by itself.

    Raises:
        DataError: the disk has no room, or the folder cannot be written.
    """
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    wanted = {"version": VERSION, "shape": list(shape), "dtype": np.dtype(dtype).name}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock"), description, poll):
            if not _is_valid(path, wanted):
                _make(path, wanted, fill, description)
    except OSError as error:
        raise DataError(f"the cache of {description} failed: {error}", ELSEWHERE) from error
    return np.memmap(path / "data", dtype=dtype, mode="r", shape=shape)


@contextmanager
def _locked(path: Path, description: str, poll: Poll) -> Iterator[None]:
    """Holds an exclusive lock that the kernel frees if this process dies."""
    with path.open("a") as file:
        waiting = False
        while not locked(file):
            if not waiting:
                log.info("waiting for another process that computes %s", description)
            waiting = True
            poll()
            time.sleep(ASK_EVERY)
        yield


def _is_valid(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the directory holds this array, whole (its size; the content is not hashed again)."""
    try:
        found = json.loads((path / "manifest.json").read_text())
        size = (path / "data").stat().st_size
    except (OSError, ValueError):
        return False
    return found == wanted and size == _bytes(wanted)


def _bytes(manifest: dict[str, Any]) -> int:
    return math.prod(manifest["shape"]) * np.dtype(manifest["dtype"]).itemsize


def _make(
    path: Path, manifest: dict[str, Any], fill: Callable[[NDArray[Any]], None], description: str
) -> None:
    partial = path.with_name(path.name + ".partial")
    for stale in (partial, path):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        _reserve(partial / "data", _bytes(manifest), description)
        array = np.memmap(
            partial / "data", dtype=manifest["dtype"], mode="r+", shape=tuple(manifest["shape"])
        )
        fill(array)
        array.flush()
        with (partial / "manifest.json").open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _reserve(path: Path, size: int, description: str) -> None:
    """Claims the disk space first: writing to a mapped file on a full disk kills the process."""
    log.info("computing %s: %.1f MiB in %s", description, size / 2**20, path.parent.parent)
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise DataError(
                f"the cache of {description} needs {size / 2**20:.1f} MiB in {path.parent.parent}, "
                f"which cannot be had: {error.strerror}",
                ELSEWHERE,
            ) from None
