"""Whatever is wrong with a shard folder is found, and named."""

import hashlib
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kdad_dist.data.index import (
    INDEX_FILE,
    SAMPLES_FILE,
    Index,
    Sample,
)
from kdad_dist.data.shard import PARTIAL
from kdad_dist.data.verify import verify
from kdad_dist.data.writer import pack
from kdad_dist.errors import DataError
from tests.helpers import make_mvtec
from tests.shards import rewrite


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = make_mvtec(tmp_path_factory.mktemp("in"))
    out = tmp_path_factory.mktemp("shards") / "out"
    pack(root, out, size=32, samples_per_shard=3)
    return out


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(packed, tmp_path / "shards")


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def defective(shards: Path) -> Sample:
    return next(sample for sample in Index.read(str(shards)).samples if sample.mask)


def test_sound_shards_have_no_fault(packed):
    assert verify(str(packed)) == []
    assert verify(str(packed), decode=True) == []


def test_sound_shards_have_no_fault_over_http(packed):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(packed))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert verify(f"http://127.0.0.1:{server.server_port}", decode=True) == []
        server.shutdown()


def test_a_flipped_bit_in_an_image_names_shard_and_key(shards):
    sample = defective(shards)
    flip(shards / sample.shard, sample.image.offset + 40)
    faults = verify(str(shards))
    assert len(faults) == 2
    assert faults[0].startswith(f"{sample.shard} has the sha256 ")
    assert faults[1] == f"{sample.shard}: {sample.key}.png does not match its sha256"


def test_a_flipped_bit_in_a_mask_names_it(shards):
    sample = defective(shards)
    assert sample.mask
    flip(shards / sample.shard, sample.mask.offset + 20)
    assert f"{sample.shard}: {sample.key}.mask.png does not match its sha256" in verify(str(shards))


def test_a_flipped_bit_anywhere_in_a_shard_is_found(shards):
    file = next(shards.glob("*.tar"))
    whole = file.read_bytes()
    for position in range(0, len(whole), len(whole) // 40):
        flip(file, position)
        assert any(fault.startswith(file.name) for fault in verify(str(shards)))
        file.write_bytes(whole)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.95])
def test_a_truncated_shard_is_found(shards, share):
    file = sorted(shards.glob("*.tar"))[0]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    faults = verify(str(shards), decode=True)
    assert f"{file.name} has {int(len(data) * share)} bytes, not {len(data)}" in faults
    assert all(file.name in fault for fault in faults)


def test_a_missing_and_an_unknown_shard_are_named(shards):
    file = sorted(shards.glob("*.tar"))[1]
    file.rename(shards / "other.tar")
    faults = verify(str(shards))
    assert faults[0] == "other.tar is a shard that is not listed in index.json"
    assert faults[1].startswith(f"{file.name} is missing or unreadable")
    assert len(faults) == 2


def test_swapped_shards_are_recognised_as_each_other(shards):
    one, two = sorted(shards.glob("*train*.tar"))[:2]
    one.rename(shards / "aside")
    two.rename(one)
    (shards / "aside").rename(two)
    assert verify(str(shards)) == [
        f"{one.name} holds the content of {two.name}",
        f"{two.name} holds the content of {one.name}",
    ]


def test_a_shard_of_another_data_set_is_found(shards, tmp_path):
    other = make_mvtec(tmp_path / "in", train=7)
    pack(other, tmp_path / "other", size=32, samples_per_shard=4)
    name = sorted(shards.glob("*train*.tar"))[0].name
    shutil.copy(sorted((tmp_path / "other").glob("*train*.tar"))[0], shards / name)
    faults = verify(str(shards))
    assert any(name in fault and "sha256" in fault for fault in faults)


def test_an_index_of_another_version_is_the_fault(shards):
    rewrite(shards, lambda index: index.update(version=2))
    assert len(verify(str(shards))) == 1
    assert "has version 2; this program reads version 1" in verify(str(shards))[0]


@pytest.mark.parametrize("name", [INDEX_FILE, SAMPLES_FILE])
def test_a_changed_missing_or_senseless_index_is_the_fault(shards, name):
    whole = (shards / name).read_bytes()
    for content in (whole.replace(b"tile", b"tilt", 1), whole[:-20], b"", b"[]", b"\xff\xfe"):
        (shards / name).write_bytes(content)
        assert len(verify(str(shards))) == 1
        assert name in verify(str(shards))[0]
    (shards / name).unlink()
    assert len(verify(str(shards))) == 1


def test_wrong_counts_are_found(shards):
    def change(index):
        index["counts"]["train"]["tile"]["good"] += 1
        index["shards"][0]["samples"] += 1

    rewrite(shards, change)
    faults = verify(str(shards))
    assert any("counts" in fault for fault in faults)
    assert any("should hold 4 samples, not 3" in fault for fault in faults)


def test_two_samples_with_one_key_are_found(shards):
    rewrite(shards, samples=lambda rows: [*rows, rows[0]])
    assert any("is the key of 2 samples" in fault for fault in verify(str(shards)))


def test_a_member_that_is_not_where_the_index_says_is_found(shards):
    def change(rows):
        rows[0]["image"]["offset"] += 512
        return rows

    rewrite(shards, samples=change)
    key = Index.read(str(shards)).samples[0].key
    assert any(f"{key}.png is not where the index says" in fault for fault in verify(str(shards)))


def test_a_sample_that_contradicts_its_json_is_found(shards):
    def change(rows):
        rows[0]["defect_type"] = "dent"
        return rows

    rewrite(shards, samples=change)
    key = Index.read(str(shards)).samples[0].key
    assert any(f"{key}.json is missing or contradicts" in fault for fault in verify(str(shards)))


def test_a_member_that_the_index_does_not_list_is_found(shards):
    file = sorted(shards.glob("*.tar"))[0]
    with tarfile.open(file, "a") as tar:
        tar.addfile(tarfile.TarInfo("extra.png"))
    data = file.read_bytes()

    def change(index):
        index["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    rewrite(shards, change)
    assert verify(str(shards)) == [f"{file.name}: extra.png is not listed in the index"]


def test_decoding_finds_what_hashes_cannot(shards):
    rewrite(shards, lambda index: index.update(image_size=48))
    assert verify(str(shards)) == []
    faults = verify(str(shards), decode=True)
    assert len(faults) == 13
    assert all("has 32 x 32 pixels, not 48" in fault for fault in faults)


def test_the_rest_of_a_killed_pack_is_named(shards):
    (shards / PARTIAL).mkdir()
    assert "left by a pack that was killed" in verify(str(shards))[0]


def test_a_folder_that_does_not_exist_is_no_damaged_one_and_its_neighbour_is_told(packed):
    for use in (verify, Index.read):
        with pytest.raises(DataError, match=f"{packed}s does not exist") as told:
            use(f"{packed}s")
        assert told.value.remedy.startswith(f"did you mean {packed}? give the folder")


def test_a_folder_without_an_index_is_the_fault(tmp_path):
    assert len(verify(str(tmp_path))) == 1
    assert "index.json cannot be read" in verify(str(tmp_path))[0]


def test_an_unreadable_shard_is_named(open_folder, as_unprivileged):
    shards = open_folder / "shards"
    pack(make_mvtec(open_folder / "in"), shards, size=32)
    file = sorted(shards.glob("*.tar"))[0]
    file.chmod(0)
    faults = verify(str(shards))
    assert len(faults) == 1
    assert file.name in faults[0]
    assert "Permission denied" in faults[0]


def test_a_folder_that_may_not_be_listed_is_named(open_folder, as_unprivileged):
    shards = open_folder / "shards"
    pack(make_mvtec(open_folder / "in"), shards, size=32)
    shards.chmod(0o311)
    faults = verify(str(shards))
    shards.chmod(0o755)
    assert faults == [f"{shards} cannot be listed: Permission denied"]
