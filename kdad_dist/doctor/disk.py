"""Whether a file system does what runs rely on, tried out in a folder that is removed again.

Checkpoints and results appear by renaming, and are flushed before; a directory is kept by a lock
that other processes must see; decoded pixels lie in a file that is mapped.
"""

import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kdad_dist.data.index import Index
from kdad_dist.data.source import is_remote
from kdad_dist.doctor.checks import NOTE, OK, PROBLEM, Finding, Request
from kdad_dist.files import sync_directory
from kdad_dist.wording import amount

LEAST, LITTLE = 2**30, 10 * 2**30
"""Bytes that are free: below the first a run can hardly start, below the second it may not end."""
SLOW_FLUSH = 0.5
"""Seconds."""
OWN_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
"""Options of mounts, of NFS and Lustre, with which locks stay on this machine."""
ELSEWHERE = "choose another place: `output` for runs, KDAD_CACHE for the cache"
TO_STAY = f"for what is to stay, {ELSEWHERE}; for a container, mount a folder of its host"
ONE_MACHINE = "start a run on one machine at a time, or mount it with locks that are passed on"
TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1]) as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


@dataclass(frozen=True)
class Mount:
    """The file system that a place lies on."""

    kind: str
    """As the system names it, such as ext4."""
    options: str = ""

    def means(self) -> tuple[str, str | None]:
        """What follows for runs ("" of a common disk), and what to do about it, where something is.

        Whether two machines keep out of each other's way cannot be tried from one of them.
        """
        kind, options = self.kind.removeprefix("fuse."), set(self.options.split(","))
        if kind in {"tmpfs", "ramfs"}:
            return "memory, which training needs too, and which a restart empties", TO_STAY
        if kind == "overlay":
            return "goes with the container it belongs to", TO_STAY
        if own := options & OWN_LOCKS:
            return f"another machine does not see our locks ({', '.join(own)})", ONE_MACHINE
        if kind in {"beegfs", "cifs", "smb3"}:
            return "whether another machine sees our locks, its settings decide", ONE_MACHINE
        if kind in {"lustre", "gpfs", "ceph", "ceph-fuse", "glusterfs"}:
            return "other machines see our renames and locks", None
        if self.kind.startswith("fuse") or kind in {"9p", "vboxsf"}:
            return "whether a rename is one step, the program behind it decides", TO_STAY
        if kind.startswith("nfs"):
            return "other machines see our locks, and new files some seconds later", None
        return "", None


def disks(request: Request) -> Iterator[Finding]:
    """The directories that are written to: of runs, of the cache, and those that were named."""
    from kdad_dist.data.cache import cache_root  # torch, which may be what is broken

    output = Path("runs") if request.config is None else request.config.directory
    for directory in dict.fromkeys([output, cache_root(), *request.directories]):
        yield disk(directory)


def shards(request: Request) -> Iterator[Finding]:
    """The directory that is read, and may be one that cannot be written: nothing is tried in it."""
    if request.config is None:
        return
    place = request.config.data.shards
    index = Index.read(place)
    below = Mount("") if is_remote(place) else mount(Path(place))
    kind = f" ({below.kind})" if below.kind else ""
    images, files = amount(len(index.samples), "image"), amount(len(index.shards), "shard")
    means, _ = below.means()  # which is no trouble to those who only read
    yield Finding(
        "shards", OK, f"{place}{kind}: {images} in {files}" + (f"; {means}" if means else "")
    )


def disk(directory: Path) -> Finding:
    """What can be done in a directory, or in the one above it that is there already."""
    place = directory.absolute()
    while not place.is_dir():
        place = place.parent
    below = mount(place)
    where = f"{directory} ({below.kind})"
    try:
        with tempfile.TemporaryDirectory(prefix=".kdad-doctor-", dir=place) as folder:
            seconds = try_flush(Path(folder))
            fault = try_rename(Path(folder)) or try_lock(Path(folder)) or try_map(Path(folder))
    except OSError as error:
        found = f"{where} cannot be written: {error.strerror or error}"
        return Finding("disk", PROBLEM, found, f"allow this user to write there, or {ELSEWHERE}")
    if fault:
        return Finding("disk", PROBLEM, f"{where}: {fault[0]}", fault[1])
    free = shutil.disk_usage(place).free
    means, remedy = below.means()
    found = f"{where}: {free / 2**30:.1f} GiB free; rename, flush, lock and map work"
    found += f"; {means}" if means else ""
    if free < LITTLE:
        return Finding(
            "disk", PROBLEM if free < LEAST else NOTE, found, f"make room, or {ELSEWHERE}"
        )
    if seconds > SLOW_FLUSH:
        found += f"; a flush takes {seconds:.1f} s"
        return Finding("disk", NOTE, found, "each checkpoint waits for flushes: save less often")
    return Finding("disk", NOTE if remedy else OK, found, remedy)


def mount(place: Path) -> Mount:
    """That of the longest mount point above a place."""
    above = {str(path) for path in (place.resolve(), *place.resolve().parents)}
    found = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in above]
    if not found:
        return Mount("unknown")
    part = max(found, key=lambda part: len(part.mountpoint))
    return Mount(part.fstype, part.opts)


def try_flush(folder: Path) -> float:
    """Seconds that it takes until a small file and its directory are on the disk."""
    start = time.monotonic()
    with open(folder / "old", "wb") as file:
        file.write(b"old")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)
    return time.monotonic() - start


def try_rename(folder: Path) -> tuple[str, str] | None:
    """What is wrong with renaming, and what to do about it: it replaces a file, moves a folder."""
    (folder / "new").write_bytes(b"new")
    (folder / "new").replace(folder / "old")
    (folder / "partial").mkdir()
    (folder / "partial/file").touch()
    (folder / "partial").rename(folder / "final")
    if (folder / "old").read_bytes() != b"new" or not (folder / "final/file").is_file():
        return "a file that was renamed does not have its new content", ELSEWHERE
    return None


def try_lock(folder: Path) -> tuple[str, str] | None:
    """The same of locks: one process keeps another one out, and lets it in afterwards."""
    path = folder / "lock"
    command = [sys.executable, "-S", "-c", TRY_LOCK, str(path)]

    def gets_it() -> bool:
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0  # noqa: S603

    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = f"mount it with locks (Lustre: -o flock; NFS: not nolock), or {ELSEWHERE}"
            return f"flock does not work: {error.strerror}", remedy
        if gets_it():
            return "flock does not keep another process out", ELSEWHERE
    return None if gets_it() else ("flock is not let go of", ELSEWHERE)


def try_map(folder: Path) -> tuple[str, str] | None:
    """The same of a file in memory."""
    path = folder / "mapped"
    path.write_bytes(bytes(mmap.PAGESIZE))
    try:
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[:3] = b"new"
            mapped.flush()
    except OSError as error:
        remedy = "set KDAD_CACHE to a local disk, or data.cache=none"
        return f"files cannot be mapped: {error.strerror}", remedy
    return None if path.read_bytes()[:3] == b"new" else ("a mapped file is not written", ELSEWHERE)
