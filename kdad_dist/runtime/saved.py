"""The checkpoints of a run as they lie on the disk: found, verified, read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdad_dist.errors import CheckpointError
from kdad_dist.models.gather import processes, rank_here
from kdad_dist.runtime.identity import SOURCES
from kdad_dist.runtime.manifest import first_sound, published, ranked, read_manifest, verify
from kdad_dist.runtime.together import Group, on_main, together


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


class Checkpoints:
    """Finds and reads the checkpoints of one run.

    Every method but `check` and `manifest` is collective over the processes of
    `torch.distributed`, where it is initialised: all of them call it, and all get the same answer
    or the same error.

    Args:
        directory: holds the checkpoints and nothing else; it need not be there.
        identity: what must not differ between saving and loading, such as digests of the
            configuration and of the data, by name. It stands in every manifest. Not needed to find
            a checkpoint.
    """

    def __init__(self, directory: Path, identity: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.identity = dict(identity or {})

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
        self.refuse_another_run(path, body)
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

    def refuse_another_run(self, path: Path, body: dict[str, Any]) -> None:
        """Raises CheckpointError where a manifest is not of this run."""
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
