"""Who reads what: pure arithmetic, without torch, files or processes.

With `Plan` the order of an epoch depends on (seed, epoch) alone. A global batch is a run of that
order; each process takes every world-th row of it. Hence a step holds the same images on 1 or 64
processes, every image comes exactly once per epoch, and to resume one needs to know nothing but
the step. `StreamPlan` promises less, for data that can only be read shard by shard.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
_MASK = (1 << 64) - 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014): a bijection whose outputs look random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def order(count: int, seed: int, epoch: int) -> Rows:
    """A permutation of range(count) drawn from (seed, epoch).

    Sorts hashes rather than calling a library's generator, whose stream may change between
    versions: a run must be resumable after an upgrade.
    """
    start = mix(np.array([(seed * 0x9E3779B97F4A7C15 + epoch + 1) & _MASK], dtype=np.uint64))
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(mix(start + counter), kind="stable").astype(np.int64)


def seeds(rows: Rows, seed: int, epoch: int) -> Rows:
    """A number for each row, drawn from (seed, epoch, row): what is random about an image in an
    epoch is drawn from it.
    """
    start = mix(np.array([((seed + 1) * 0xD1342543DE82EF95 + epoch + 1) & _MASK], dtype=np.uint64))
    return mix(start + rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """What one process contributes to one forward pass of all processes."""

    rows: Rows
    """Positions in the list of samples; may be empty."""
    seeds: Rows
    """Of each row in this epoch."""
    step_images: int
    """Images of the whole step over all processes, by which the loss is divided."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan(ABC):
    """The reading plan of one process, which reads each of some images once per epoch."""

    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    micro_batch_size: int | None = None

    @property
    @abstractmethod
    def images(self) -> int:
        """Of an epoch, over all processes."""

    @abstractmethod
    def steps(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of this process in steps `start` to `stop` - 1, step by step."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch_size)

    def samples_seen(self, step: int) -> int:
        """Images of all processes in the first `step` steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.images + min(within * self.batch_size, self.images)


@dataclass(frozen=True)
class Plan(EpochPlan):
    """Reads images at random access."""

    count: int

    @property
    def images(self) -> int:
        return self.count

    @property
    def accumulation(self) -> int:
        """Forward passes per step: how often a full batch exceeds what the processes can hold."""
        if self.micro_batch_size is None:
            return 1
        return -(-self.batch_size // (self.micro_batch_size * self.world))

    def steps(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        epoch_of_order, rows = -1, np.empty(0, np.int64)
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of_order:
                epoch_of_order, rows = epoch, order(self.count, self.seed, epoch)
            yield self.cut(rows[within * self.batch_size : (within + 1) * self.batch_size], epoch)

    def cut(self, batch: Rows, epoch: int) -> list[MicroBatch]:
        """This process's share of a global batch, in equal numbers of passes on every process."""
        passes = min(self.accumulation, len(batch))
        shares = [part[self.rank :: self.world] for part in np.array_split(batch, passes)]
        return [MicroBatch(rows, seeds(rows, self.seed, epoch), len(batch)) for rows in shares]


@dataclass(frozen=True)
class StreamPlan(EpochPlan):
    """Reads whole shards, one after the other.

    The shards of an epoch are permuted by (seed, epoch) and dealt out so that the processes hold
    about the same number of images. Every step takes the same number of images over all processes
    as in `Plan`, from each process in proportion to what it holds. So every image comes exactly
    once per epoch, all processes make equal numbers of steps and passes, one that holds fewer
    images (or none) contributes fewer, and where each one stands at a step is known everywhere.
    Unlike in `Plan`, which images a step holds depends on the number of processes.
    """

    shards: tuple[Rows, ...]
    """Positions in the list of samples, by shard."""

    @property
    def images(self) -> int:
        return sum(map(len, self.shards))

    def deal(self, epoch: int) -> list[list[int]]:
        """The shards of each process in reading order: each goes to whom holds fewest images."""
        dealt: list[list[int]] = [[] for _ in range(self.world)]
        held = [0] * self.world
        for shard in order(len(self.shards), self.seed, epoch).tolist():
            reader = held.index(min(held))
            dealt[reader].append(shard)
            held[reader] += len(self.shards[shard])
        return dealt

    def shard_order(self, shard: int, epoch: int) -> Rows:
        """The rows of a shard in the order of this epoch."""
        rows = self.shards[shard]
        return rows[order(len(rows), self.seed + (shard + 1) * 1_000_003, epoch)]

    def steps(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        epoch_of_rows = -1
        rows, readers = np.empty(0, np.int64), np.empty(0, np.int64)
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of_rows:
                epoch_of_rows, (rows, readers) = epoch, self._epoch(epoch)
            first, last = within * self.batch_size, (within + 1) * self.batch_size
            shares = np.bincount(readers[first:last], minlength=self.world)
            begin = np.count_nonzero(readers[:first] == self.rank)
            passes = self._passes(int(shares.max()))
            images = int(shares.sum())
            mine = rows[begin : begin + shares[self.rank]]
            yield [
                MicroBatch(part, seeds(part, self.seed, epoch), images)
                for part in np.array_split(mine, passes)
            ]

    def _passes(self, largest_share: int) -> int:
        if self.micro_batch_size is None:
            return 1
        return -(-largest_share // self.micro_batch_size)

    def _epoch(self, epoch: int) -> tuple[Rows, Rows]:
        """This process's rows in order, and which process gives each image of the global order."""
        dealt = self.deal(epoch)
        held = np.array([sum(len(self.shards[i]) for i in shards) for shards in dealt])
        # Spreads each process's images evenly over the epoch: the i-th of n stands at (i + 1/2)/n.
        places = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in held])
        readers = np.repeat(np.arange(self.world), held)[np.argsort(places, kind="stable")]
        mine = [self.shard_order(shard, epoch) for shard in dealt[self.rank]]
        return np.concatenate([np.empty(0, np.int64), *mine]), readers


def by_shard(names: Sequence[str]) -> dict[str, Rows]:
    """The positions of samples by the shard that each lies in, in order of appearance."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: np.array(found, dtype=np.int64) for name, found in rows.items()}
