"""Which images share a shard: arithmetic on records and sizes, the same on every machine."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from kdad_dist.data.index import Split
from kdad_dist.data.records import Record

READERS = 16
"""Shards that a category's split is cut into where it has enough images: as many processes can
stream it at once."""
SAMPLES = (16, 256)
"""Fewest images of a shard for that purpose, and most."""
SHARD_BYTES = 64 * 2**20
"""About the most that a shard holds: a streaming reader keeps two in memory."""


@dataclass(frozen=True)
class ShardPlan:
    file: str
    split: Split
    records: Sequence[Record]


def partition(records: Sequence[Record], size: int, samples: int | None) -> Iterator[ShardPlan]:
    """Cuts each split of each category into shards.

    A shard mixes what its split holds (its order is that of a hash), since a streaming reader
    sees one shard after another.

    Args:
        records: sorted by category and split.
        size: of the stored images; 0: that of the files.
        samples: images of a shard; None: as many as suit streaming readers.
    """
    number = 0
    for (category, split), group in groupby(records, lambda r: (r.category, r.split)):
        rows = sorted(group, key=lambda r: hashlib.sha256(r.key.encode()).digest())
        # PNG takes about half of the raw bytes of a photograph.
        each = size**2 * 3 // 2 or sum(r.bytes for r in rows) // len(rows) + 1
        count = samples or max(min(SAMPLES[1], SHARD_BYTES // each), 1)
        if samples is None:
            count = min(count, max(SAMPLES[0], -(-len(rows) // READERS)))
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in category)
        for start in range(0, len(rows), count):
            # Numbered through, so that categories whose names shorten alike do not collide.
            file = f"{name[:64]}-{split}-{number:05}.tar"
            yield ShardPlan(file, split, rows[start : start + count])
            number += 1
