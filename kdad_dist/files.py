"""Files that are never seen half-written, those that travel along, and a lock that dies with its
process.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kdad_dist.errors import DataError, UsageError


def write_bytes(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Replaces a file in one step: written elsewhere, flushed, renamed.

    Args:
        aside: folder of the same disk for the unfinished file; that of the file where not given.
    """
    temporary = (aside or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Makes renames in a directory last, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync of directories
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode(errors="backslashreplace"))  # file names need not be UTF-8


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where it cannot be read: it is about to be replaced, say."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns what the system refuses into an error that names the file, or else the directory.

    Raises:
        DataError: the disk is full, say, or may not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"  # as numpy puts it
        raise DataError(
            f"{error.filename or directory} cannot be written: {reason}",
            f"give {directory} room and permission, or choose another place; then start again",
        ) from error


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Waits until no other process is between reading a file and writing it again."""
    with open(path.with_name(f".{path.name}.lock"), "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shipped(folder: str) -> Path:
    """`launch` or `slurm`: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def locked(file: IO[Any], how: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock of an open file is ours now; the system frees it when this process ends."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


LOCK = ".lock"
PATIENCE = 0.3
"""Seconds for which a lock may be held by those who only look at it."""


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds a directory for this process alone; the system lets go of it when the process ends.

    Raises:
        UsageError: another process holds it.
    """
    with open(directory / LOCK, "a+", encoding="utf-8") as file:
        if not _locked_before(file, time.monotonic() + PATIENCE):
            file.seek(0)
            raise UsageError(
                f"{directory} is in use by another process ({file.read().strip() or 'unknown'})",
                "wait for it, stop it, or give this run another `output`",
            )
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _locked_before(file: IO[str], deadline: float) -> bool:
    """Whether the file could be locked before the deadline."""
    while not locked(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(PATIENCE / 10)
    return True


@dataclass(frozen=True)
class Holder:
    """Who holds a directory, or was the last to do so."""

    holds: bool
    text: str
    """Such as "pid 7 on node1"; empty where nobody ever held it."""


def holder(directory: Path) -> Holder:
    """Looks at the lock of a directory, and lets go of it at once."""
    try:
        with open(directory / LOCK, encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
            return Holder(not locked(file, fcntl.LOCK_SH), text)
    except OSError:
        return Holder(False, "")
