"""Batches from whole shards, read one after the other: for data on a web server, or beyond a disk.

The index says where each member lies, what it hashes to, and who reads it. So nothing else of a
shard is read or interpreted: a library for tar files would start a shell for a web address, unpack
what is compressed, and fill the memory with the zeros that the header of a sparse member promises.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from http.client import HTTPException
from itertools import groupby
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from kdad_dist.data.augment import Augment
from kdad_dist.data.image import decode_image
from kdad_dist.data.index import Index, Sample
from kdad_dist.data.loader import AHEAD, Loader, Micro
from kdad_dist.data.pixels import to_float
from kdad_dist.data.plan import MicroBatch, StreamPlan, by_shard
from kdad_dist.data.reader import DAMAGED, Fit, check_member, check_root, shard_address
from kdad_dist.data.source import (
    is_remote,
    join,
    open_file,
    open_remote,
    patiently,
    read_of,
)
from kdad_dist.data.threads import Decoder, in_advance
from kdad_dist.errors import DataError
from kdad_dist.types import Poll, go_on

CHUNK = 2**20


class StreamLoader(Loader):
    """From shards that are read from start to end.

    Each epoch reads and decodes anew. The bytes of two shards, the one in use and the next, are in
    memory. To resume, the shards that were finished in this epoch are not opened again.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        index: Index,
        plan: StreamPlan,
        image_size: int,
        device: torch.device,
        augment: Augment | None = None,
        poll: Poll = go_on,
        labels: NDArray[np.int64] | None = None,
        margin: int = 0,
    ) -> None:
        """Args:
            plan: made from `by_shard` of the samples' shards.
            poll: called by a thread between two images of a shard that is read.
            margin: pixels by which images are read larger before their centre is cut out.

        Raises:
            ConfigError: the images were packed too small, or the address is of no known kind.
        """
        check_root(index.root)
        super().__init__(plan, device, augment, labels)
        grouped = by_shard([sample.shard for sample in samples])
        assert all(map(np.array_equal, plan.shards, grouped.values())), "another plan's samples"
        self._samples = samples
        self._poll = poll
        self._root = index.root
        self._rows = grouped
        self._fit = Fit(image_size, index.image_size, index.resize, margin)
        self._decoder = Decoder(self._image, image_size)

    def steps(self, start: int, stop: int) -> Iterator[list[Micro]]:
        """The passes of each step from `start` to `stop` - 1; later steps are read meanwhile.

        Raises:
            DataError: a shard cannot be read, or is not what the index says.
        """
        loads = (partial(self._load, name) for name in self._needed(start, stop))
        with closing(in_advance(loads, 1, 1)) as shards:
            held = HeldShard(shards)
            calls = (partial(self._read, held, parts) for parts in self._plan.steps(start, stop))
            # One thread: rows come from the shards in their order.
            with closing(in_advance(calls, AHEAD, 1, self._device)) as steps:
                yield from steps

    def _needed(self, start: int, stop: int) -> Iterator[str]:
        """The shards in the order in which the rows of these steps lie in them."""
        steps = self._plan.steps(start, stop)
        rows = (row for parts in steps for part in parts for row in part.rows.tolist())
        return (name for name, _ in groupby(rows, lambda row: self._samples[row].shard))

    def _read(self, held: "HeldShard", parts: list[MicroBatch]) -> list[Micro]:
        pin = self._device.type == "cuda"
        micros = []
        for part in parts:
            items = [(self._samples[row], held.data(row)) for row in part.rows.tolist()]
            image = to_float(self._decoder.read(items, pin), self._device)
            micros.append(self._micro(part, image))
        return micros

    def _image(self, item: tuple[Sample, bytes]) -> NDArray[np.uint8]:
        sample, data = item
        return self._fit.image(decode_image(data, self._where(sample)))

    def _where(self, sample: Sample) -> str:
        return f"{sample.key} in {join(self._root, sample.shard)}"

    def _load(self, name: str) -> dict[int, bytes]:
        """The checked bytes of a shard's images, by row."""
        address = shard_address(self._root, name)
        try:
            return patiently(address, lambda: self._images(name, address))
        except (OSError, HTTPException) as error:
            raise DataError(f"{address} cannot be read: {error}", DAMAGED) from None

    def _images(self, name: str, address: str) -> dict[int, bytes]:
        """As `_load`, in one try."""
        found: dict[int, bytes] = {}
        at = 0
        with open_remote(address) if is_remote(address) else open_file(address) as stream:
            for row in sorted(self._rows[name].tolist(), key=self._offset):
                self._poll()
                sample = self._samples[row]
                skip(stream, sample.image.offset - at)
                found[row] = read_of(stream, sample.image.size)
                at = sample.image.offset + sample.image.size
                check_member(found[row], sample.image, self._where(sample))
        return found

    def _offset(self, row: int) -> int:
        return self._samples[row].image.offset


class HeldShard:
    """The bytes of images by row, of one shard at a time."""

    def __init__(self, shards: Iterator[dict[int, bytes]]) -> None:
        self._shards = shards
        self._bytes: dict[int, bytes] = {}

    def data(self, row: int) -> bytes:
        """Rows must be asked for in the order of the shards that they lie in."""
        if row not in self._bytes:
            self._bytes = next(self._shards)
        return self._bytes[row]


def skip(stream: IO[bytes], count: int) -> None:
    """Passes over so many bytes of a file, or of what a server sends."""
    if stream.seekable():
        stream.seek(count, os.SEEK_CUR)
        return
    while count > 0 and (passed := len(stream.read(min(count, CHUNK)))):
        count -= passed
