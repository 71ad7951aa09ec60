"""Checkpoints: directories that are whole or absent, and verified before a byte of them is used.

```
checkpoints/
  step_00001000/
    manifest.json      step, metrics, identity, size and sha256 of every file, and its own sha256
    .metadata          which tensor lies where
    __0_0.distcp ...   the tensors, one file from each process that wrote
  .step_00001100.3f2a9c01.partial/      being written, or being deleted; never read
```

Learning rate, position in the data and the like are not stored: they follow from the
configuration and the step.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kdad_dist.errors import CheckpointError
from kdad_dist.runtime.identity import SOURCES
from kdad_dist.runtime.manifest import (
    VERSION,
    delete,
    delete_partials,
    file_entry,
    partial_name,
    read_manifest,
    replace_manifest,
    step_name,
    sync_directory,
    verify,
)
from kdad_dist.runtime.tensors import METADATA, check_fit, read_tensors, write_tensors
from kdad_dist.runtime.together import on_main, processes, rank_here, together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Images trained on, over all processes."""


class CheckpointManager:
    """Writes, finds, reads and prunes the checkpoints of one run.

    Every method but `manifest` is collective over the processes of `torch.distributed`, where it
    is initialised: all of them call it, and all get the same answer or the same error.

    Args:
        directory: holds the checkpoints and nothing else; made at the first save.
        keep: how many of the newest to keep, beside the best.
        identity: what must not differ between saving and loading, such as digests of the
            configuration and of the data, by name. It stands in every manifest.
    """

    def __init__(self, directory: Path, keep: int, identity: dict[str, str]) -> None:
        assert keep >= 1, "without a checkpoint a run cannot be resumed"
        self.directory = directory
        self.keep = keep
        self.identity = identity

    def save(
        self,
        student: nn.Module,
        optimizer: Optimizer,
        state: TrainState,
        metrics: dict[str, float],
    ) -> Path:
        """The checkpoint's directory, on disk in full before its name appears; then prunes.

        Where the step has a sound checkpoint already, only metrics new to it are written. Leftovers
        of killed saves are removed here and not earlier, since only a trainer may do that.

        Raises:
            CheckpointError: on every process, naming the one that could not write, and why.
        """
        final = self.directory / step_name(state.step)
        partial = on_main("prepared", final, lambda: self._prepare(final, metrics))
        if partial is None:
            return final
        try:
            together("written", final, lambda: write_tensors(partial, student, optimizer))
            shares = together("written", final, lambda: _own_files(partial))
            body = {
                "version": VERSION,
                "step": state.step,
                "samples_seen": state.samples_seen,
                "metrics": metrics,
                "identity": self.identity,
                "world_size": len(shares),
                "files": {name: entry for share in shares for name, entry in share.items()},
            }
            on_main("published", final, lambda: _publish(body, partial, final))
        except CheckpointError:
            if rank_here() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        on_main("pruned", self.directory, lambda: self._prune(final))
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint that is sound; broken ones are reported and passed over."""
        return self._first_sound(lambda paths: reversed(paths))

    def best(self) -> Path | None:
        """The sound checkpoint of the lowest `val_loss`, the earliest of equals."""
        return self._first_sound(_ranked)

    def load(
        self, path: Path, student: nn.Module, optimizer: Optimizer | None = None
    ) -> TrainState:
        """Fills the student, and the optimizer if given, bit for bit; says how far it had come.

        Every file is verified first, each process taking a share of them. The optimizer keeps its
        own hyper-parameters. Frozen parameters of the student need not be in the checkpoint.

        Raises:
            CheckpointError: it is damaged, of another run, or does not fit the student.
        """

        def read() -> dict[str, Any]:
            body = read_manifest(path)
            # First: of another network, names and shapes say more than that its hash differs.
            check_fit(path, body["files"], student)
            self._check_identity(path, body)
            read_tensors(path, body["files"], student, optimizer)
            return body

        together("read", path, lambda: verify(path, rank_here(), processes()))
        body = together("read", path, read)[0]
        return TrainState(step=body["step"], samples_seen=body["samples_seen"])

    @staticmethod
    def manifest(path: Path) -> dict[str, Any]:
        """What a checkpoint says of itself: step, samples_seen, metrics, identity, files."""
        return read_manifest(path)

    def _published(self) -> list[Path]:
        """Directories with a checkpoint's name, oldest first."""
        return sorted(path for path in self.directory.glob("step_" + "[0-9]" * 8) if path.is_dir())

    def _first_sound(self, order: Callable[[list[Path]], Iterable[Path]]) -> Path | None:
        """The main process chooses for all, since a network disk may show others something else."""

        def search() -> Path | None:
            for path in order(self._published()):
                if _is_sound(path):
                    return path
            return None

        return on_main("searched", self.directory, search)

    def _prepare(self, final: Path, metrics: dict[str, float]) -> Path | None:
        """A new directory to write into, or None where the step has a sound checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        delete_partials(self.directory)
        if final.exists() and _is_sound(final):
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
        paths = [path for path in self._published() if path.name <= newest.name]
        keep = {*paths[-self.keep :], *_ranked(paths)[:1]}
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


def _is_sound(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        log.warning("passing over a checkpoint: %s", error)
        return False
    return True


def _ranked(paths: list[Path]) -> list[Path]:
    """Those with a finite `val_loss`, the lowest first, the earlier of equals first."""
    ranked = []
    for path in paths:
        try:
            loss = read_manifest(path)["metrics"].get("val_loss", math.nan)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            continue
        if math.isfinite(loss):
            ranked.append((loss, path.name, path))
    return [path for *_, path in sorted(ranked)]


def _own_files(partial: Path) -> dict[str, dict[str, Any]]:
    """Entries of the files that this process wrote, read back from the disk."""
    files = sorted(partial.glob(f"__{rank_here()}_*"))
    if rank_here() == 0:
        files.append(partial / METADATA)
    return {file.name: file_entry(file) for file in files}


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
