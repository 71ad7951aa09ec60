"""Reads what W&B writes offline, which its own package can only send to a server."""

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, HEAD = 32 * 1024, 7, 7
FULL, FIRST, LAST = 1, 2, 4


def read_records(part: Path) -> Iterator[Record]:
    """The records of an `offline-run-*` folder: a LevelDB log behind a header of 7 bytes."""
    [file] = part.glob("*.wandb")
    data, at, parts = file.read_bytes(), HEADER, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:  # the rest of a block is too short for a head: zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body, at = data[at + HEAD : at + HEAD + length], at + HEAD + length
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


def read_history(part: Path) -> list[dict[str, str]]:
    """The rows of a part, each value as the JSON that stands in the file."""
    return [
        {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        for record in read_records(part)
        if record.HasField("history")
    ]
