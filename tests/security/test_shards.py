"""Shards and an index that somebody made to harm us: read, named or refused, and nothing else."""

import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from kdad_dist.data.index import INDEX_FILE, SAMPLES_FILE, Index, Split, fingerprint
from kdad_dist.data.plan import StreamPlan, by_shard
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.source import fetch
from kdad_dist.data.stream import StreamLoader
from kdad_dist.data.verify import verify
from kdad_dist.errors import DataError, KdadError
from tests.helpers import texture
from tests.security.fuzz import altered, fuzzed, survives
from tests.shards import make_shards, rewrite

FIRST = "train-00000.tar"


def stream(index: Index) -> dict[int, np.ndarray]:
    """The pixels of all training images, by row."""
    samples = index.select(Split.TRAIN, val_fraction=0)
    shards = tuple(by_shard([sample.shard for sample in samples]).values())
    loader = StreamLoader(samples, index, StreamPlan(shards, batch_size=4), 16, torch.device("cpu"))
    steps = loader.steps(0, loader.steps_per_epoch)
    batches = [micro.batch for step in steps for micro in step]
    return {
        int(row): (image.permute(1, 2, 0) * 255).round().byte().numpy()
        for batch in batches
        for row, image in zip(batch.row, batch.image, strict=True)
    }


def read(index: Index) -> list[np.ndarray]:
    reader = ShardReader(index.root, 16)
    return [reader.image(sample) for sample in index.select(Split.TRAIN, val_fraction=0)]


def vouch(root: Path) -> None:
    """Lets the index vouch for the first shard as it is now."""

    def noted(index: dict[str, Any]) -> None:
        data = (root / FIRST).read_bytes()
        index["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite(root, noted)


def member(name: str, content: bytes = b"", **header: Any) -> bytes:
    """A member of a tar, whatever its header says."""
    info = tarfile.TarInfo(name)
    for key, value in ({"size": len(content)} | header).items():
        setattr(info, key, value)
    padding = -len(content) % tarfile.BLOCKSIZE
    return info.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * padding


def sparse(name: str, size: int) -> bytes:
    """A member of a few bytes that says it is mostly a hole of so many."""
    buffer = bytearray(member(name, type=tarfile.GNUTYPE_SPARSE))
    buffer[386:398], buffer[398:410] = b"%011o\0" % size, b"%011o\0" % 0  # where, how much
    buffer[483:495] = b"%011o\0" % size  # what it unpacks to
    buffer[148:156] = b"%06o\0 " % (sum(buffer[:148] + buffer[156:512]) + 8 * 32)
    return bytes(buffer)


HOSTILE = {
    "absolute": member("/tmp/kdad_escaped.png", b"x"),
    "above": member("../../kdad_escaped.png", b"x"),
    "link": member("tile/train/link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("tile/train/hard.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": member("tile/train/zero.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "pipe": member("tile/train/pipe.png", type=tarfile.FIFOTYPE),
    "twice": member("tile/train/000.png", b"another"),
    "hole": sparse("tile/train/hole.png", 2**32),
    "pickle": member("tile/train/code.pth", b"\x80\x04cos\nsystem\n."),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_named_and_neither_read_nor_unpacked(tmp_path: Path, kind: str):
    root = tmp_path / "a" / "b" / "shards"
    make_shards(root)
    shard = root / FIRST
    shard.write_bytes(HOSTILE[kind] + shard.read_bytes())
    moved = len(HOSTILE[kind])

    def move(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            row["image"]["offset"] += moved * (row["shard"] == FIRST)
        return rows

    rewrite(root, samples=move)
    vouch(root)
    before = sorted(tmp_path.rglob("*"))
    name = tarfile.TarInfo.frombuf(HOSTILE[kind][:512], "utf-8", "strict").name
    assert any(name in fault for fault in verify(str(root)))
    index = Index.read(str(root))
    expected = [texture(i, 16, 16) for i in range(10)]
    assert all(np.array_equal(*pair) for pair in zip(read(index), expected, strict=True))
    found = stream(index)
    assert all(np.array_equal(found[row], image) for row, image in enumerate(expected))
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/kdad_escaped.png").exists()


@pytest.mark.parametrize("kind", ["compressed", "endless", "negative", "noise"])
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, kind: str):
    make_shards(tmp_path)
    shard = tmp_path / FIRST
    match kind:
        case "compressed":  # 100 MB of zeros in 100 kB
            shard.write_bytes(gzip.compress(member("x.png", bytes(10**8)), 1))
        case "endless":
            shard.write_bytes(member("x.png", b"short", size=8**11 - 1) + shard.read_bytes())
        case "negative":
            shard.write_bytes(member("x.png", b"", size=-(2**40)) + shard.read_bytes())
        case "noise":
            shard.write_bytes(np.random.default_rng(0).bytes(20_000))
    vouch(tmp_path)
    assert any(FIRST in fault for fault in verify(str(tmp_path)))
    for use in (read, stream):
        with pytest.raises(DataError, match=FIRST):
            use(Index.read(str(tmp_path)))


def image(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda row: row["image"].update(changes)


ROWS: dict[str, Callable[[dict[str, Any]], object]] = {
    "key above": lambda row: row.update(key="../../x"),
    "absolute key": lambda row: row.update(key="/etc/passwd"),
    "empty key": lambda row: row.update(key=""),
    "key with zero": lambda row: row.update(key="tile/\0"),
    "category above": lambda row: row.update(category="../../x"),
    "category of dots": lambda row: row.update(category=".."),
    "shard elsewhere": lambda row: row.update(shard="../secret.tar"),
    "shard with zero": lambda row: row.update(shard="a\0.tar"),
    "huge size": image(size=10**12),
    "negative size": image(size=-1),
    "negative offset": image(offset=-512),
    "offset beyond numbers": image(offset=2**64),
    "text for a number": image(offset="here"),
    "unknown split": lambda row: row.update(split="all"),
    "no image": lambda row: row.update(image=None),
    "no key": lambda row: row.pop("key"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_an_index_that_vouches_for_nonsense_is_refused_by_name(tmp_path: Path, kind: str):
    make_shards(tmp_path)

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ROWS[kind](rows[3])
        return rows

    rewrite(tmp_path, samples=change)
    with pytest.raises(DataError, match=rf"{SAMPLES_FILE} says of"):
        Index.read(str(tmp_path))
    assert SAMPLES_FILE in verify(str(tmp_path))[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"version": 1}', "null", '"text"'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(DataError, match=INDEX_FILE):
        Index.read(str(tmp_path))


@pytest.mark.parametrize("name", [INDEX_FILE, SAMPLES_FILE, FIRST])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_waited_for(tmp_path: Path, name: str, kind: str):
    make_shards(tmp_path)
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    assert any("pipe or device" in fault for fault in verify(str(tmp_path)))
    for use in (read, stream):
        with pytest.raises(DataError, match=f"{name} cannot be read|pipe or device"):
            use(Index.read(str(tmp_path)))


def test_a_file_larger_than_it_may_be_is_not_read_to_its_end(tmp_path: Path):
    with (tmp_path / INDEX_FILE).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"index\.json has more than 1,000 bytes"):
        fetch(str(tmp_path), INDEX_FILE, 1000)


@fuzzed
def test_no_index_brings_anything_but_an_error_that_a_user_understands(
    tmp_path: Path, examples: int
):
    make_shards(tmp_path, train=3, scratch=1)
    described = json.loads((tmp_path / INDEX_FILE).read_text())
    lines = (tmp_path / SAMPLES_FILE).read_text().splitlines()
    whole = {"described": described, "rows": [json.loads(line) for line in lines]}

    def check(document: Any) -> None:
        said, rows = document.get("described"), document.get("rows")
        rows = rows if isinstance(rows, list) else []
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if isinstance(said, dict):
            said["samples_sha256"] = hashlib.sha256(lines).hexdigest()
            said["fingerprint"] = fingerprint(said)
        (tmp_path / SAMPLES_FILE).write_bytes(lines)
        (tmp_path / INDEX_FILE).write_text(json.dumps(said))
        assert all(isinstance(fault, str) for fault in verify(str(tmp_path), decode=True))
        index = Index.read(str(tmp_path))
        for use in (read, stream):
            try:
                use(index)
            except KdadError:
                continue

    survives(examples, check, altered(whole))


@fuzzed
def test_no_bytes_in_place_of_a_shard_bring_anything_else(tmp_path: Path, examples: int):
    make_shards(tmp_path, train=3, scratch=1)
    sound = (tmp_path / FIRST).read_bytes()

    def check(change: tuple[int, bytes]) -> None:
        at, content = change
        (tmp_path / FIRST).write_bytes(sound[:at] + content + sound[at + len(content) :])
        vouch(tmp_path)
        assert all(isinstance(fault, str) for fault in verify(str(tmp_path), decode=True))
        stream(Index.read(str(tmp_path)))

    header = st.integers(0, 511) | st.integers(0, len(sound))
    survives(examples, check, st.tuples(header, st.binary(max_size=600)))
