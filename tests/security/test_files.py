"""Pictures and files of tensors that are something else, or far too much."""

import hashlib
import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from kdad_dist.data.image import MAX_BYTES, decode_image, decode_mask, read_file
from kdad_dist.data.index import INDEX_FILE, Index
from kdad_dist.data.new_images import find_images
from kdad_dist.data.writer import pack
from kdad_dist.errors import DataError, WeightsError
from kdad_dist.models.weights import read_weights
from kdad_dist.score.examples import map_name
from kdad_dist.score.parts import read as read_parts
from tests.helpers import header_of_png, make_mvtec, texture
from tests.security.fuzz import fuzzed, survives


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.place),))


@pytest.fixture
def trap(tmp_path: Path):
    """The bytes of a pickle; afterwards, that nobody has run it, and that it would have run."""
    place = tmp_path / "it_ran"
    code = pickle.dumps(Trap(place))
    yield code
    assert not place.exists()
    pickle.loads(code)
    assert place.exists()


@pytest.mark.filterwarnings("ignore")  # torch, on the version of the pickle
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors", "w.bin", "w.npy", "w.json"])
def test_a_pickle_under_any_name_is_no_weights(tmp_path: Path, trap: bytes, name: str):
    (tmp_path / name).write_bytes(trap)
    with pytest.raises(WeightsError):
        read_weights(tmp_path / name)


def test_tensors_beside_code_are_not_taken_either(tmp_path: Path, trap: bytes):
    file = tmp_path / "w.pth"
    torch.save({"conv.weight": torch.ones(1), "code": Trap(tmp_path / "it_ran")}, file)
    with pytest.raises(WeightsError, match="would run code"):
        read_weights(file)


def test_a_pickle_in_place_of_an_index_an_image_or_scores_is_refused(tmp_path: Path, trap: bytes):
    (tmp_path / INDEX_FILE).write_bytes(trap)
    with pytest.raises(DataError, match=r"index\.json is not a shard index"):
        Index.read(str(tmp_path))
    with pytest.raises(DataError, match="not an image"):
        decode_image(trap, "000.png")
    (tmp_path / "parts").mkdir()
    array = io.BytesIO()
    np.save(array, np.array([Trap(tmp_path / "it_ran")]), allow_pickle=True)
    for content in (trap, array.getvalue()):
        name = hashlib.sha256(content).hexdigest()
        (tmp_path / "parts" / name).write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            list(read_parts(tmp_path, [name]))


@fuzzed
def test_no_file_of_weights_brings_anything_but_an_error_that_a_user_understands(
    tmp_path: Path, examples: int
):
    tensors = {"conv.weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
    sound = {}
    for name, save in (("w.pth", torch.save), ("w.safetensors", save_file)):
        save(tensors, tmp_path / name)
        sound[name] = (tmp_path / name).read_bytes()

    def check(change: tuple[str, int, bytes]) -> None:
        name, at, content = change
        at %= len(sound[name])
        (tmp_path / name).write_bytes(sound[name][:at] + content)
        read_weights(tmp_path / name)
        (tmp_path / name).write_bytes(sound[name][:at] + content + sound[name][at + len(content) :])
        read_weights(tmp_path / name)

    places = st.integers(0, 200) | st.integers(0, 10_000)
    survives(examples, check, st.tuples(st.sampled_from([*sound]), places, st.binary(max_size=8)))


def png_with(name: bytes, body: bytes) -> bytes:
    """A sound PNG of 8 x 8 pixels with one more chunk, its checksum right."""
    plain = io.BytesIO()
    Image.fromarray(texture(0, 8, 8)).save(plain, "PNG")
    data = plain.getvalue()
    end_of_header = 8 + 25
    chunk = struct.pack(">I", len(body)) + name + body
    chunk += struct.pack(">I", zlib.crc32(name + body))
    return data[:end_of_header] + chunk + data[end_of_header:]


def test_text_that_unpacks_to_too_much_is_refused(monkeypatch):
    bomb = png_with(b"zTXt", b"key\0\0" + zlib.compress(bytes(10**8)))
    assert len(bomb) < 200_000
    with pytest.raises(DataError, match=r"bomb\.png cannot be decoded"):
        decode_image(bomb, "bomb.png")
    assert PngImagePlugin.MAX_TEXT_CHUNK < 10**7


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path):
    root = make_mvtec(tmp_path / "images")
    with (root / "train/good/000.png").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(DataError, match=r"000\.png cannot be read: it has 640,000,001 bytes"):
        pack(root, tmp_path / "shards", workers=1)
    with pytest.raises(OSError, match="more than any picture"):
        read_file(root / "train/good/000.png")


def test_a_bomb_among_the_images_stops_a_pack_by_name_and_leaves_nothing(tmp_path: Path):
    root = make_mvtec(tmp_path / "images")
    (root / "train/good/000.png").write_bytes(header_of_png(50_000, 50_000))
    with pytest.raises(DataError, match=r"000\.png says it has .*pixels"):
        pack(root, tmp_path / "shards", workers=1)
    assert not (tmp_path / "shards" / INDEX_FILE).exists()


@pytest.mark.filterwarnings("ignore")  # Pillow, on damaged tags
@fuzzed
def test_no_chunk_of_a_png_with_its_checksum_right_brings_anything_else(examples: int):
    names = [b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"gAMA", b"acTL"]
    names += [b"fcTL", b"fdAT", b"IDAT", b"sRGB", b"pHYs", b"IEND", b"cHRM"]
    body = st.binary(max_size=64) | st.binary(max_size=64).map(
        lambda b: b"k\0\0" + zlib.compress(b)
    )

    def check(chunk: tuple[bytes, bytes]) -> None:
        data = png_with(*chunk)
        for decode in (decode_image, decode_mask):
            decode(data, "x.png")

    survives(5 * examples, check, st.tuples(st.sampled_from(names), body))


@pytest.mark.filterwarnings("ignore")
@fuzzed
def test_no_other_picture_brings_anything_else(examples: int):
    sound = []
    for form in ("JPEG", "TIFF", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.fromarray(texture(1, 12, 12)).save(file, form, exif=Image.Exif())
        sound.append(file.getvalue())

    def check(change: tuple[bytes, int, bytes]) -> None:
        data, at, content = change
        at %= len(data)
        decode_image(data[:at] + content + data[at + len(content) :], "x")

    places = st.integers(0, 80) | st.integers(0, 10_000)
    survives(5 * examples, check, st.tuples(st.sampled_from(sound), places, st.binary(max_size=12)))


@fuzzed
def test_no_pattern_for_new_images_brings_anything_else(tmp_path: Path, examples: int, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = st.text(max_size=12) | st.sampled_from(["[", "**", "a\0b", "[!", "{", "\ud800", "~"])
    words = words.filter(lambda word: not word.startswith("/"))  # all files of this machine
    survives(examples, lambda word: find_images([word], tmp_path / "out"), words)


def test_a_folder_that_is_taken_away_while_it_is_searched_is_told(tmp_path: Path, monkeypatch):
    def scandir(path):
        (tmp_path / "b").rmdir()
        return scan(path)

    (tmp_path / "b").mkdir()
    scan = os.scandir
    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(DataError, match=f"{tmp_path}/b (cannot be read|holds no image)"):
        find_images([str(tmp_path / "b")], tmp_path / "out")


def test_a_map_of_any_key_lies_in_its_folder():
    for key in ("../../x", "/etc/passwd", "..", ".", "a" * 4000, "a/../b", "$(touch x)", "-rf"):
        assert Path(f"{map_name(key)}.png").name == f"{map_name(key)}.png"
