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

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdad_dist.errors import CheckpointError
from kdad_dist.files import sync_directory
from kdad_dist.models.gather import rank_here
from kdad_dist.runtime.background import Background
from kdad_dist.runtime.manifest import (
    VERSION,
    delete,
    delete_partials,
    file_entry,
    is_sound,
    partial_name,
    published,
    ranked,
    read_manifest,
    replace_manifest,
    step_name,
)
from kdad_dist.runtime.saved import Checkpoints, Contents, TrainState, Writable
from kdad_dist.runtime.together import Group, on_main, together


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


class CheckpointManager(Checkpoints):
    """Writes and prunes the checkpoints of one run too; collective as well.

    Args:
        directory: made at the first save.
        rotation: which checkpoints to keep.
        asynchronous: write in the background, from a copy on the host; collective to make then.
    """

    def __init__(
        self,
        directory: Path,
        rotation: Rotation,
        identity: dict[str, str],
        asynchronous: bool = False,
    ) -> None:
        super().__init__(directory, identity)
        assert rotation.newest >= 1, "without a checkpoint a run cannot be resumed"
        self.rotation = rotation
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

    def _prepare(self, final: Path, metrics: dict[str, float]) -> Path | None:
        """A new directory to write into, or None where the step has a sound checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        delete_partials(self.directory)
        if final.exists() and is_sound(final):
            body = read_manifest(final)
            self.refuse_another_run(final, body)
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
