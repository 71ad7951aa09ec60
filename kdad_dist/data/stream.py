"""Batches from whole shards, read one after the other: for data on a web server, or beyond a disk.

The `webdataset` library takes the shards apart, but we open them ourselves: it would start a shell
for every web address. The index is still needed, for who reads what and for the members' hashes.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from http.client import HTTPException
from itertools import groupby
from tarfile import TarError
from typing import BinaryIO, cast
from urllib.request import urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from kdad_dist.data.augment import Augment
from kdad_dist.data.image import decode_image
from kdad_dist.data.index import HTTP_TIMEOUT, Index, Sample, is_remote, join
from kdad_dist.data.loader import AHEAD, Loader, Micro, to_float
from kdad_dist.data.plan import MicroBatch, StreamPlan, by_shard
from kdad_dist.data.reader import DAMAGED, Fit, check_member, check_root, shard_address
from kdad_dist.data.threads import Decoder, in_advance
from kdad_dist.errors import DataError, KdadError
from kdad_dist.types import Poll, go_on


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
    ) -> None:
        """Args:
            plan: made from `by_shard` of the samples' shards.
            poll: called by a thread between two images of a shard that is read.

        Raises:
            ConfigError: `image_size` exceeds the packed size, or the address is of no known kind.
        """
        check_root(index.root)
        super().__init__(plan, device, augment, labels)
        grouped = by_shard([sample.shard for sample in samples])
        assert all(map(np.array_equal, plan.shards, grouped.values())), "another plan's samples"
        self._samples = samples
        self._poll = poll
        self._root = index.root
        self._rows = grouped
        self._fit = Fit(image_size, index.image_size, index.resize)
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
        wanted = {self._samples[row].key: row for row in self._rows[name]}
        found: dict[int, bytes] = {}
        try:
            with open_stream(address) as stream:
                files = tar_file_expander([{"url": address, "stream": stream}])
                for entry in group_by_keys(files):
                    self._poll()
                    if (row := wanted.get(entry["__key__"])) is None:
                        continue
                    sample = self._samples[row]
                    data = entry.get(sample.image.ext, b"")
                    check_member(data, sample.image, self._where(sample))
                    found[row] = data
        except KdadError:
            raise
        except (OSError, HTTPException, TarError, ValueError) as error:
            raise DataError(f"{address} cannot be read: {error}", DAMAGED) from None
        if missing := sorted(wanted.keys() - {self._samples[row].key for row in found}):
            raise DataError(f"{address} ends without {', '.join(missing[:3])}", DAMAGED)
        return found


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


def open_stream(address: str) -> BinaryIO:
    """A shard to be read from start to end, without a shell in between."""
    if is_remote(address):
        return cast(BinaryIO, urlopen(address, timeout=HTTP_TIMEOUT))  # noqa: S310
    return open(address, "rb")
