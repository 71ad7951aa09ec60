"""Checkpoints: directories that are whole or absent, and verified before a byte of them is used.

```
checkpoints/
  step_00001000/
    manifest.json      step, metrics, identity, format, size and sha256 of every file, and its own
    .metadata          (format dcp) which tensor lies where
    __0_0.distcp ...   (format dcp) the tensors, one file from each process that wrote
    zero/              (format zero) the same in DeepSpeed's own files
  .step_00001100.3f2a9c01.partial/      being written, or being deleted; never read
```

Learning rate, position in the data and the like are not stored: they follow from the
configuration and the step.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdad_dist.errors import CheckpointError
from kdad_dist.files import sync_directory
from kdad_dist.runtime.background import Background
from kdad_dist.runtime.identity import SOURCES
from kdad_dist.runtime.manifest import (
    VERSION,
    delete,
    delete_partials,
    file_entry,
    first_sound,
    is_sound,
    partial_name,
    published,
    ranked,
    read_manifest,
    replace_manifest,
    step_name,
    verify,
)
from kdad_dist.runtime.together import Group, on_main, processes, rank_here, together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Images trained on, over all processes."""


class Writable(Protocol):
    """What can be written into a checkpoint."""

    def write(self, folder: Path, group: Group) -> list[Path]:
        """Writes this process's files, flushed to the disk; names them. Collective."""
        ...


class Contents(Writable, Protocol):
    """What a checkpoint holds, and the form in which it stands there."""

    format: str

    def snapshot(self) -> Writable:
        """The same on the host, where further training does not change it."""
        ...

    def check(self, folder: Path, files: Collection[str]) -> None:
        """Compares names and shapes with those of verified files.

        Raises:
            CheckpointError: they are of another student; it says how.
        """
        ...

    def read(self, folder: Path, files: Collection[str]) -> None:
        """Takes everything from verified files. Collective.

        Raises:
            CheckpointError: on every process; they do not fit, and nothing has been changed then,
                or one could not be read.
        """
        ...


@dataclass(frozen=True)
class Rotation:
    """Which checkpoints stay: the best on held-out images, and these."""

    newest: int
    """How many of the newest."""
    hours: float = 0.0
    """All that are younger."""

    def keeps(self, paths: list[Path]) -> set[Path]:
        """Of checkpoints, the oldest first."""
        oldest = time.time() - 3600 * self.hours
        young = {p for p in paths if p.stat().st_mtime > oldest} if self.hours else set()
        return {*paths[-self.newest :], *young}


class CheckpointManager:
    """Writes, finds, reads and prunes the checkpoints of one run.

    Every method but `check` and `manifest` is collective over the processes of
    `torch.distributed`, where it is initialised: all of them call it, and all get the same answer
    or the same error.

    Args:
        directory: holds the checkpoints and nothing else; made at the first save.
        rotation: which of them to keep.
        identity: what must not differ between saving and loading, such as digests of the
            configuration and of the data, by name. It stands in every manifest.
        asynchronous: write in the background, from a copy on the host; collective to make then.
    """

    def __init__(
        self,
        directory: Path,
        rotation: Rotation,
        identity: dict[str, str],
        asynchronous: bool = False,
    ) -> None:
        assert rotation.newest >= 1, "without a checkpoint a run cannot be resumed"
        self.directory = directory
        self.rotation = rotation
        self.identity = identity
        self._background = Background() if asynchronous else None

    def save(self, contents: Contents, state: TrainState, metrics: dict[str, float]) -> Path:
        """The checkpoint's directory, on disk in full before its name appears; then prunes.

        Where the step has a sound checkpoint already, only metrics new to it are written. Leftovers
        of killed saves are removed here and not earlier, since only a trainer may do that.

        Raises:
            CheckpointError: on every process, naming the one that could not write, and why. In the
                background, the save before failed.
        """
        self.wait()
        final = self.directory / step_name(state.step)
        partial = on_main("prepared", final, lambda: self._prepare(final, metrics))
        if partial is None:
            return final
        body = {
            "version": VERSION,
            "format": contents.format,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "metrics": metrics,
            "identity": self.identity,
        }
        if self._background is None:
            self._write(contents, partial, final, body, None)
        else:
            copy = contents.snapshot()
            self._background.start(lambda group: self._write(copy, partial, final, body, group))
        return final

    def wait(self) -> None:
        """Returns when nothing is being written in the background any more.

        Raises:
            CheckpointError: on every process; the checkpoint could not be written.
        """
        if self._background is not None:
            self._background.wait()

    def _write(
        self, contents: Writable, partial: Path, final: Path, body: dict[str, Any], group: Group
    ) -> None:
        try:
            own = together("written", final, lambda: contents.write(partial, group), group)
            mine = own[rank_here()]
            shares = together("written", final, lambda: _entries(mine, partial), group)
            files = {name: entry for share in shares for name, entry in share.items()}
            whole = {**body, "world_size": len(shares), "files": files}
            on_main("published", final, lambda: _publish(whole, partial, final), group)
        except CheckpointError:
            if rank_here() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        on_main("pruned", self.directory, lambda: self._prune(final), group)

    def latest(self) -> Path | None:
        """The newest checkpoint that is sound; broken ones are reported and passed over."""
        return self._first_sound(reversed)

    def best(self) -> Path | None:
        """The sound checkpoint of the lowest `val_loss`, the earliest of equals."""
        return self._first_sound(ranked)

    def load(self, path: Path, contents: Contents) -> TrainState:
        """Fills the contents, bit for bit; says how far the run had come.

        Every file is verified first, each process taking a share of them.

        Raises:
            CheckpointError: it is damaged, of another run, or does not fit.
        """
        together(
            "read", path, lambda: verify(path, rank_here(), processes(), shown=rank_here() == 0)
        )
        body = together("read", path, lambda: self.check(path, contents))[0]
        contents.read(path, body["files"])
        return TrainState(step=body["step"], samples_seen=body["samples_seen"])

    def check(self, path: Path, contents: Contents) -> dict[str, Any]:
        """The manifest of a verified checkpoint, once it is clear that it is of this run.

        Raises:
            CheckpointError: it is of another one, or does not fit.
        """
        body = read_manifest(path)
        # First: of another network, names and shapes say more than that its hash differs.
        contents.check(path, body["files"])
        self._check_identity(path, body)
        return body

    @staticmethod
    def manifest(path: Path) -> dict[str, Any]:
        """What a checkpoint says of itself: step, samples_seen, metrics, identity, files."""
        return read_manifest(path)

    def _first_sound(self, order: Callable[[list[Path]], Iterable[Path]]) -> Path | None:
        """The main process chooses for all, since a network disk may show others something else."""

        def search() -> Path | None:
            return first_sound(order(published(self.directory)))

        return on_main("searched", self.directory, search)

    def _prepare(self, final: Path, metrics: dict[str, float]) -> Path | None:
        """A new directory to write into, or None where the step has a sound checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        delete_partials(self.directory)
        if final.exists() and is_sound(final):
            body = read_manifest(final)
            self._check_identity(final, body)
            if not metrics.items() <= body["metrics"].items():
                replace_manifest(final, body | {"metrics": body["metrics"] | metrics})
            return None
        partial = partial_name(final)
        partial.mkdir()
        return partial

    def _prune(self, newest: Path) -> None:
        """Deletes all but the newest and the best, without reading their tensors again.

        Checkpoints beyond `newest` were passed over as broken when the run resumed; they are left
        to look at until training reaches their step.
        """
        paths = [path for path in published(self.directory) if path.name <= newest.name]
        keep = {*self.rotation.keeps(paths), *ranked(paths)[:1]}
        for path in paths:
            if path not in keep:
                delete(path)

    def _check_identity(self, path: Path, body: dict[str, Any]) -> None:
        there = body["identity"]
        names = [
            name
            for name in sorted(self.identity.keys() | there.keys())
            if self.identity.get(name) != there.get(name)
        ]
        if names:
            hashes = [f"{n} ({there.get(n)} there, {self.identity.get(n)} here)" for n in names]
            sources = "; ".join(f"{n} is {SOURCES[n]}" for n in names if n in SOURCES)
            explained = f" ({sources})" if sources else ""
            raise CheckpointError(
                f"{path} is of another run: it differs in {', '.join(hashes)}",
                f"restore what differs{explained}, or choose another output directory",
            )


def _entries(written: list[Path], partial: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of files, read back from the disk, by their names in the checkpoint."""
    return {str(file.relative_to(partial)): file_entry(file) for file in written}


def _publish(body: dict[str, Any], partial: Path, final: Path) -> None:
    for name in body["files"]:
        if not (partial / name).is_file():
            raise CheckpointError(
                f"{partial / name} was written by one process, but the main one cannot see it",
                "put the run directory on a file system that all nodes share",
            )
    replace_manifest(partial, body)
    if final.exists():  # broken, or it would have been kept
        delete(final)
    partial.rename(final)
    sync_directory(final.parent)
