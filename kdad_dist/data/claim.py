"""Who may write into a shard folder: one process at a time, and only into a folder of its own.

While a folder is not finished it holds a folder `.partial` with a lock, the options of the pack and
a note of every finished shard. What is not named there was not put there by us.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdad_dist.data.index import INDEX_FILE, SAMPLES_FILE
from kdad_dist.data.shard import PARTIAL
from kdad_dist.errors import DataError
from kdad_dist.files import locked, write_bytes

LOCK = "lock"
OPTIONS = "pack.json"
NOTE = ".tar.json"


@contextmanager
def claimed(out: Path, options: dict[str, Any]) -> Iterator[None]:
    """Holds `out`, new, empty or unfinished, for this process; then leaves only what is finished.

    After an error the finished shards stay for the next call; without any, nothing stays.

    Raises:
        DataError: it holds something else, or an unfinished pack with other options, or another
            process is writing into it.
    """
    _check_owned(out)
    new = not out.exists()
    (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _check_options(out, options)
        for stale in (out / PARTIAL).glob("*.tmp"):
            stale.unlink()
        try:
            yield
        except BaseException:
            if not any((out / PARTIAL).glob(f"*{NOTE}")):
                shutil.rmtree(out / PARTIAL, ignore_errors=True)
                with suppress(OSError):
                    if new:
                        out.rmdir()
            raise
        # Another process may be opening the lock just now; it will find the index, and clear up.
        shutil.rmtree(out / PARTIAL, ignore_errors=True)


def drop_stale(out: Path, files: set[str]) -> None:
    """Removes the finished shards that are not among `files`: their images have changed."""
    for note in (out / PARTIAL).glob(f"*{NOTE}"):
        file = note.name.removesuffix(".json")
        if file not in files:
            (out / file).unlink(missing_ok=True)
            note.unlink()


def _check_owned(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is not a folder", "choose another OUT")
    if (out / INDEX_FILE).exists():  # another process has finished it since we looked
        return
    notes = (out / PARTIAL).glob(f"*{NOTE}")
    ours = {PARTIAL, SAMPLES_FILE, *(note.name.removesuffix(".json") for note in notes)}
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    if foreign := sorted(found - (ours if PARTIAL in found else set())):
        raise DataError(
            f"{out} holds something else: {', '.join(foreign[:5])}",
            "choose a new or empty folder for OUT",
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The kernel frees the lock when this process dies, however that comes about."""
    path = out / PARTIAL / LOCK
    with open(path, "ab") as file:
        # The holder before us may have finished, and removed the lock that we have opened.
        if not (
            locked(file)
            and path.exists()
            and os.path.samestat(os.fstat(file.fileno()), path.stat())
        ):
            raise DataError(f"another process is packing into {out}", "wait until it has ended")
        yield


def _check_options(out: Path, options: dict[str, Any]) -> None:
    path = out / PARTIAL / OPTIONS
    if not path.exists():
        write_bytes(path, json.dumps(options).encode())
    before = json.loads(path.read_bytes())
    differences = [
        f"{key} was {before.get(key)}, not {value}"
        for key, value in options.items()
        if before.get(key) != value
    ]
    if differences:
        raise DataError(
            f"{out} holds an unfinished pack with other options: {'; '.join(differences)}",
            f"go on with those, or remove {out}",
        )
