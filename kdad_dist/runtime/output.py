"""Folders of results: all processes fill a new one, which takes the place of the old one whole."""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from kdad_dist import files
from kdad_dist.errors import UsageError
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.together import shared

T = TypeVar("T")


@contextmanager
def filled(
    final: Path, here: Session, keep: Collection[str] = (), worth: str | None = None
) -> Iterator[Path]:
    """A folder for all processes to write into; at the end it becomes `final`.

    After an error `final` is what it was, and the folder is gone.

    Args:
        keep: names in the folder, which is empty but for them.
        worth: a pattern; where it matches something in the folder, this outlives an error, for the
            next attempt to go on from there.

    Raises:
        DataError: on all processes, if the system refuses to write.
        UsageError: on all processes, if another launch is filling the folder.
    """
    partial = final.with_name(f"{final.name}.partial")
    with ExitStack() as stack:
        mine = [emptied(partial, keep, worth)] if here.is_main else []
        write(partial, lambda: [stack.enter_context(folder) for folder in mine])
        yield partial
        write(final, lambda: [replace(final, partial) for _ in mine])


def write(folder: Path, work: Callable[[], T]) -> T:
    """What `work` returned; it writes below `folder`, and fails on all processes or on none."""

    def writing() -> T:
        with files.writing(folder):
            return work()

    return shared(writing)


@contextmanager
def emptied(folder: Path, keep: Collection[str], worth: str | None) -> Iterator[None]:
    """Makes or empties a folder that no other launch uses; removes it after an error if there is
    nothing to keep.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.exclusive(folder):
            for old in folder.iterdir():
                if old.name not in {files.LOCK, *keep}:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            yield
    except BaseException:
        # A Ctrl-C may come before the lock is held; what another launch holds is left to it.
        with suppress(OSError, UsageError), files.exclusive(folder):
            if worth is None or not any(folder.glob(worth)):
                shutil.rmtree(folder, ignore_errors=True)
        raise


def replace(final: Path, partial: Path) -> None:
    """Puts a folder in place of another one; killed in between, both are still there."""
    (partial / files.LOCK).unlink()
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
