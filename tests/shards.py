"""Shard folders and web servers for tests of the readers."""

import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from PIL import Image

from kdad_dist.data.index import (
    INDEX_FILE,
    SAMPLES_FILE,
    VERSION,
    Index,
    Sample,
    Shard,
    Split,
    fingerprint,
    sample_line,
)
from kdad_dist.data.sample import Member
from tests.helpers import square_mask, texture

Fault = Literal["dropped", "busy", "cut"]


def encode(image: NDArray) -> bytes:
    """An image or a boolean mask as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def make_shards(
    root: Path,
    train: int = 10,
    scratch: int = 2,
    per_shard: int = 4,
    size: int = 16,
    packed_size: int | None = 16,
    resize: str = "squash",
    height: int | None = None,
) -> Index:
    """A shard folder written byte by byte, to try readers against more than the own writer."""
    root.mkdir(parents=True, exist_ok=True)
    samples, shards = [], []
    for split, count in ((Split.TRAIN, train), (Split.TEST, scratch)):
        for first in range(0, count, per_shard):
            file = f"{split}-{first // per_shard:05}.tar"
            numbers = range(first, min(first + per_shard, count))
            shape = (height or size, size)
            samples += _write_shard(root / file, split, numbers, shape)
            data = (root / file).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            shards.append(Shard(file, digest, len(data), len(numbers), split))
    lines = "".join(map(sample_line, samples)).encode()
    (root / SAMPLES_FILE).write_bytes(lines)
    described = {
        "version": VERSION,
        "layout": "mvtec",
        "image_size": packed_size,
        "resize": resize,
        "categories": ["tile"],
        "shards": [asdict(shard) for shard in shards],
        "samples_sha256": hashlib.sha256(lines).hexdigest(),
    }
    described["fingerprint"] = fingerprint(described)
    (root / INDEX_FILE).write_text(json.dumps(described))
    return Index.read(str(root))


def rewrite(
    shards: Path,
    described: Callable[[dict[str, Any]], object] | None = None,
    samples: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
) -> None:
    """Changes the index so that its own hashes still fit."""
    index = json.loads((shards / INDEX_FILE).read_text())
    if samples:
        rows = [json.loads(line) for line in (shards / SAMPLES_FILE).read_text().splitlines()]
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in samples(rows)).encode()
        (shards / SAMPLES_FILE).write_bytes(lines)
        index["samples_sha256"] = hashlib.sha256(lines).hexdigest()
    if described:
        described(index)
    index["fingerprint"] = fingerprint(index)
    (shards / INDEX_FILE).write_text(json.dumps(index))


def _write_shard(path: Path, split: Split, numbers: range, shape: tuple[int, int]) -> list[Sample]:
    samples = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(key: str, ext: str, data: bytes) -> Member:
            offset = tar.offset + tarfile.BLOCKSIZE
            header = tarfile.TarInfo(f"{key}.{ext}")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
            return Member(ext, offset, len(data), hashlib.sha256(data).hexdigest())

        for number in numbers:
            bad = split is Split.TEST
            key = f"tile/{split}/{number:03}"
            image = add(key, "png", encode(texture(1000 * bad + number, *shape)))
            mask = add(key, "mask.png", encode(square_mask(*shape, side=6) > 0)) if bad else None
            add(key, "json", b"{}")
            kind = "scratch" if bad else None
            samples.append(Sample(key, split, "tile", None, kind, int(bad), path.name, image, mask))
    return samples


@contextmanager
def serve(
    folder: Path, ranges: bool = True, faults: Iterable[Fault] = ()
) -> Iterator[tuple[str, list[str]]]:
    """A web server of the folder on localhost: its address, and the paths it is asked for.

    Args:
        faults: what becomes of the first requests for a shard: no answer at all, an error of the
            server, or an eighth of what it announces.
    """
    requests: list[str] = []
    left = list(faults)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            fault = left.pop(0) if left and path.suffix == ".tar" else None
            if fault == "busy":
                self.send_error(503)
            if fault in {"busy", "dropped"}:
                self.close_connection = True
                return
            data, wanted = path.read_bytes(), self.headers.get("Range")
            if ranges and wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            self.send_response(206 if ranges and wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 8] if fault == "cut" else data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
