"""Random access to shards: what is read is what was packed, or an error that says where."""

import json
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdad_dist.data import reader as reader_module
from kdad_dist.data import source
from kdad_dist.data.index import INDEX_FILE, Index, Split, fingerprint
from kdad_dist.data.reader import Fit, ShardReader
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.tiling import middle
from tests.helpers import square_mask, texture
from tests.shards import make_shards, serve


def test_images_and_masks_come_back_as_they_were_packed(tmp_path: Path):
    index = make_shards(tmp_path)
    reader = ShardReader(str(tmp_path), 16)
    train, test = index.select(Split.TRAIN, val_fraction=0), index.select(Split.TEST)
    assert [np.array_equal(reader.image(s), texture(i, 16, 16)) for i, s in enumerate(train)] == [
        True
    ] * 10
    assert np.array_equal(reader.mask(test[0]), square_mask(16, 16, 6) > 0)
    assert reader.mask(train[0]).shape == (16, 16) and not reader.mask(train[0]).any()


def test_a_flipped_bit_is_detected_before_its_bytes_are_used(tmp_path: Path, monkeypatch):
    index = make_shards(tmp_path)
    sample = index.samples[5]
    shard = tmp_path / sample.shard
    damaged = bytearray(shard.read_bytes())
    damaged[sample.image.offset + 40] ^= 1
    shard.write_bytes(damaged)
    monkeypatch.setattr(reader_module, "decode_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=rf"{sample.key} in .*{sample.shard}.*do not match"):
        ShardReader(str(tmp_path), 16).image(sample)


@pytest.mark.parametrize("damage", ["truncated", "missing", "swapped"])
def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path, damage: str):
    index = make_shards(tmp_path)
    sample = index.samples[3]
    shard = tmp_path / sample.shard
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[: sample.image.offset + 9])
        case "missing":
            shard.unlink()
        case "swapped":
            shard.write_bytes((tmp_path / index.samples[4].shard).read_bytes())
    with pytest.raises(DataError, match=sample.shard):
        ShardReader(str(tmp_path), 16).image(sample)


@pytest.fixture
def unreadable() -> Iterator[Index]:
    """Shards that only their owner may read, in a folder that everybody may."""
    with tempfile.TemporaryDirectory() as name:
        index = make_shards(Path(name))
        Path(name).chmod(0o755)
        for path in Path(name).glob("*.tar"):
            path.chmod(0)
        yield index


def test_a_shard_without_permission_is_an_error_that_names_it(unreadable: Index, as_unprivileged):
    with pytest.raises(DataError, match=r"train-00000.tar cannot be read: .*Permission denied"):
        ShardReader(unreadable.root, 16).image(unreadable.samples[0])


def test_an_extension_outside_the_allow_list_is_never_decoded(tmp_path: Path):
    index = make_shards(tmp_path)
    sample = index.samples[0]
    pickled = replace(sample, image=replace(sample.image, ext="pth"))
    with pytest.raises(DataError, match="'pth'"):
        ShardReader(str(tmp_path), 16).image(pickled)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "pipe:cat /etc/passwd", ".."])
def test_a_shard_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str):
    index = make_shards(tmp_path)
    with pytest.raises(DataError, match=r"not a plain file|cannot be read"):
        ShardReader(str(tmp_path), 16).image(replace(index.samples[0], shard=name))


@pytest.mark.parametrize("root", ["pipe:cat shards", "s3://bucket/shards", "file:///shards"])
def test_an_address_that_is_neither_folder_nor_http_is_refused(root: str):
    with pytest.raises(ConfigError, match="only folders and http"):
        ShardReader(root, 16)


def test_a_size_beyond_the_packed_one_is_refused_with_the_remedy(tmp_path: Path):
    make_shards(tmp_path)
    with pytest.raises(ConfigError, match="--size 32"):
        ShardReader(str(tmp_path), 32)
    with pytest.raises(ConfigError, match=r"centre_margin=5 .*of 17 .*of 16") as caught:
        ShardReader(str(tmp_path), 12, 5)
    assert "--size 17" in caught.value.remedy


def test_a_smaller_size_than_packed_is_resized(tmp_path: Path):
    index = make_shards(tmp_path)
    reader = ShardReader(str(tmp_path), 8)
    image = Image.fromarray(texture(0, 16, 16)).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(reader.image(index.samples[0]), np.asarray(image))
    assert reader.mask(index.select(Split.TEST)[0]).shape == (8, 8)


def test_original_bytes_of_any_size_become_the_square(tmp_path: Path):
    index = make_shards(tmp_path, size=30, height=20, packed_size=None)
    reader = ShardReader(str(tmp_path), 24)
    assert reader.image(index.samples[0]).shape == (24, 24, 3)
    assert reader.mask(index.select(Split.TEST)[0]).shape == (24, 24)


def test_the_centre_is_cropped_where_the_shorter_side_was_packed(tmp_path: Path):
    index = make_shards(tmp_path, size=16, height=24, packed_size=16, resize="shorter")
    reader = ShardReader(str(tmp_path), 16)
    assert np.array_equal(reader.image(index.samples[0]), texture(0, 24, 16)[4:20])
    test = index.select(Split.TEST)[0]
    assert np.array_equal(reader.mask(test), square_mask(24, 16, 6)[4:20] > 0)


@pytest.mark.parametrize(
    ("side", "size", "start"), [(8, 8, 0), (8, 4, 2), (9, 4, 2), (8, 5, 1), (9, 8, 0), (2, 1, 0)]
)
def test_the_middle_leaves_as_much_before_it_as_behind_or_one_pixel_less(side, size, start):
    assert middle(side, size) == slice(start, start + size)


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (21, 21), (16, 24)])
@pytest.mark.parametrize("mode", ["squash", "shorter"])
@pytest.mark.parametrize(("size", "margin"), [(16, 0), (12, 4), (11, 4), (12, 5), (1, 15)])
def test_what_is_seen_with_a_margin_is_the_middle_of_what_is_seen_without(
    shape: tuple[int, int], mode: str, size: int, margin: int
):
    fit, whole = Fit(size, None, mode, margin), Fit(size + margin, None, mode)
    part = middle(size + margin, size)
    image, mask = texture(0, *shape), texture(1, *shape)[..., 0] > 99
    assert np.array_equal(fit.image(image), whole.image(image)[part, part])
    assert np.array_equal(fit.mask(mask), whole.mask(mask)[part, part])
    square = whole.image(image)
    assert np.array_equal(fit.image(square), fit.image(image)), "what was packed is not resized"


@pytest.mark.parametrize(
    ("mode", "shape", "seen"),
    [
        ("squash", (16, 16), (slice(2, 14), slice(2, 14))),
        ("squash", (32, 64), (slice(4, 28), slice(8, 56))),
        ("squash", (15, 3), (slice(1, 14), slice(0, 3))),  # parts of pixels are seen too
        ("squash", (1, 2), (slice(0, 1), slice(0, 2))),
        ("shorter", (16, 24), (slice(2, 14), slice(6, 18))),
        ("shorter", (48, 32), (slice(12, 36), slice(4, 28))),
    ],
)
def test_where_in_an_image_the_window_lies(mode: str, shape: tuple[int, int], seen: object):
    fit = Fit(12, None, mode, 4)
    assert fit.seen(*shape) == seen
    assert Fit(16, None, "squash").seen(*shape) == tuple(slice(0, side) for side in shape)


@pytest.mark.parametrize("margin", [0, 5])
@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (40, 40), (201, 17)])
@pytest.mark.parametrize("mode", ["squash", "shorter"])
def test_masks_take_the_same_path_as_images(shape: tuple[int, int], mode: str, margin: int):
    fit = Fit(16, None, mode, margin)
    mask = np.zeros(shape, dtype=bool)
    mask[shape[0] // 2 :] = True
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    assert fit.image(image).shape == (16, 16, 3)
    assert (abs(fit.image(image)[..., 0] / 255.0 - fit.mask(mask)) <= 0.5).all()


def test_threads_read_the_same_as_one_and_files_stay_few(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_FILES", 2)
    index = make_shards(tmp_path, train=40)
    reader = ShardReader(str(tmp_path), 16)
    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(reader.image, index.samples[:40] * 5))
    assert all(np.array_equal(im, texture(i % 40, 16, 16)) for i, im in enumerate(images))
    assert len(reader._files._open) == 2


def test_remote_samples_are_read_by_range(tmp_path: Path):
    index = make_shards(tmp_path)
    with serve(tmp_path, ranges=True) as (address, requests):
        reader = ShardReader(address, 16)
        assert np.array_equal(reader.image(index.samples[9]), texture(9, 16, 16))
    assert requests[-1] == f"/{index.samples[9].shard}"


def test_a_server_without_ranges_is_named(tmp_path: Path):
    index = make_shards(tmp_path)
    with (
        serve(tmp_path, ranges=False) as (address, _),
        pytest.raises(DataError, match="access=stream"),
    ):
        ShardReader(address, 16).image(index.samples[0])


@pytest.mark.parametrize("fault", ["dropped", "busy", "cut"])
def test_a_sample_is_asked_for_again_where_the_server_failed(tmp_path: Path, monkeypatch, fault):
    monkeypatch.setattr(source, "PAUSES", (0.0, 0.0))
    index = make_shards(tmp_path)
    with serve(tmp_path, faults=[fault]) as (address, requests):
        reader = ShardReader(address, 16)
        assert np.array_equal(reader.image(index.samples[9]), texture(9, 16, 16))
    assert requests[-2:] == [f"/{index.samples[9].shard}"] * 2


def test_a_dead_server_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(source, "PAUSES", (0.0, 0.0))
    index, before = make_shards(tmp_path), threading.active_count()
    with serve(tmp_path, ranges=True) as (address, _):
        reader = ShardReader(address, 16)
    with pytest.raises(DataError, match="cannot be read"):
        reader.image(index.samples[0])
    assert threading.active_count() < before + 8


def test_an_index_of_another_version_is_refused(tmp_path: Path):
    make_shards(tmp_path)
    described = json.loads((tmp_path / INDEX_FILE).read_text()) | {"version": 99}
    described["fingerprint"] = fingerprint(described)
    (tmp_path / INDEX_FILE).write_text(json.dumps(described))
    with pytest.raises(DataError, match="version 99"):
        ShardReader(str(tmp_path), 16)
