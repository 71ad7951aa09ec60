"""The index: splits by key, labels by class, and trust only in what matches its own hashes."""

import json
import random
from dataclasses import replace

import pytest

from kdad_dist.data.index import (
    INDEX_FILE,
    SAMPLES_FILE,
    Index,
    Sample,
    Shard,
    Split,
    count,
    describe,
    held_out_keys,
    parse_sample,
    sample_line,
)
from kdad_dist.data.labels import check_classes
from kdad_dist.data.sample import Member
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.runtime.loaders import refuse_empty

MEMBER = Member("png", 512, 3, "0" * 64)


def sample(key: str, split=Split.TRAIN, category="tile", class_name=None, defect_type=None):
    label = None if class_name else int(defect_type is not None)
    mask = MEMBER if defect_type else None
    return Sample(
        key, split, category, class_name, defect_type, label, "tile-train-00000.tar", MEMBER, mask
    )


def write(folder, samples, **changes) -> Index:
    shards = [Shard("tile-train-00000.tar", "0" * 64, 10, len(samples), Split.TRAIN)]
    parameters = {"layout": "mvtec", "image_size": 32, "resize": "squash"}
    index, lines = describe(parameters, shards, samples)
    (folder / INDEX_FILE).write_bytes(index)
    (folder / SAMPLES_FILE).write_bytes(lines)
    return replace(Index.read(str(folder)), **changes)


@pytest.fixture
def tile(tmp_path) -> Index:
    samples = [sample(f"tile/train/good/{i:03}") for i in range(100)]
    samples += [sample(f"tile/test/good/{i}", Split.TEST) for i in range(3)]
    samples += [sample(f"tile/test/é {i}", Split.TEST, defect_type="é") for i in range(2)]
    samples += [sample(f"wood/train/{i}", category="wood") for i in range(10)]
    return write(tmp_path, samples)


@pytest.fixture
def pets(tmp_path) -> Index:
    names = [(split, name) for split in (Split.TRAIN, Split.TEST) for name in ("cat", "dog")]
    samples = [
        sample(f"pets/{split}/{name}/{i}", split, "pets", class_name=name)
        for split, name in names
        for i in range(4)
    ]
    return write(tmp_path, samples)


def test_a_sample_survives_its_line():
    for each in (sample("a/ü 漢"), sample("b", Split.TEST, defect_type="cut")):
        assert parse_sample(json.loads(sample_line(each))) == each


def test_counts_are_by_split_category_and_kind(tile, pets):
    assert count(tile.samples) == {
        "train": {"tile": {"good": 100}, "wood": {"good": 10}},
        "test": {"tile": {"good": 3, "é": 2}},
    }
    assert count(pets.samples)["test"] == {"pets": {"cat": 4, "dog": 4}}


def test_classes_told_apart_make_three_disjoint_sets_with_labels_in_the_given_order(pets):
    wanted = ["dog", "cat"]
    train, val, test = (pets.select(split, classes=wanted, val_fraction=0.01) for split in Split)
    keys = [{s.key for s in part} for part in (train, val, test)]
    assert sorted(key for part in keys for key in part) == sorted(s.key for s in pets.samples)
    # Of each class at least one is held out, however few there are.
    assert sorted(s.class_name for s in val) == ["cat", "dog"] and len(train) == 6
    assert all(s.gt_label == wanted.index(s.class_name) for s in (*train, *val, *test))
    assert pets.select(Split.TRAIN, classes=["cat", "dog"], val_fraction=0.01)[0].gt_label == 0


def test_classes_that_are_not_there_are_refused_by_name(pets, tile):
    with pytest.raises(ConfigError, match="names 'dot'") as error:
        pets.select(Split.TRAIN, classes=["cat", "dot"])
    assert "did you mean dog?" in error.value.remedy
    with pytest.raises(ConfigError, match="carry none"):
        tile.select(Split.TRAIN, classes=["cat", "dog"])
    with pytest.raises(DataError, match="no training image of dog") as empty:
        cats = pets.select(Split.TRAIN, classes=["cat", "dog"])
        refuse_empty(["cat", "dog"], [s for s in cats if s.class_name == "cat"], "here")
    assert "these have some: cat" in empty.value.remedy
    with pytest.raises(ConfigError, match="carry none"):
        check_classes(list(tile.samples), None, "here", "mvtec")


def test_training_and_validation_are_disjoint_normal_and_complete(tile):
    train, val = tile.select(Split.TRAIN, "tile"), tile.select(Split.VAL, "tile")
    keys = [s.key for s in (*train, *val)]
    assert sorted(keys) == [f"tile/train/good/{i:03}" for i in range(100)]
    assert 10 <= len(val) <= 30
    assert {s.split for s in train} == {Split.TRAIN}
    assert {s.split for s in val} == {Split.VAL}


def test_validation_depends_on_each_key_alone():
    keys = [f"k{i}" for i in range(200)]
    held = held_out_keys(keys, 0.2)
    random.Random(0).shuffle(keys)
    assert held_out_keys(keys, 0.2) == held
    assert held_out_keys(keys[:100], 0.2) == held & set(keys[:100])
    assert held <= held_out_keys(keys, 0.3)


@pytest.mark.parametrize("count_of_keys", [0, 1, 2, 3])
@pytest.mark.parametrize("fraction", [0, 0.01, 0.5, 0.99])
def test_few_images_still_train_and_validate(count_of_keys, fraction):
    held = held_out_keys([f"k{i}" for i in range(count_of_keys)], fraction)
    if count_of_keys < 2 or fraction == 0:
        assert held == set()
    else:
        assert 1 <= len(held) < count_of_keys


def test_categories_are_chosen_by_name(tile):
    assert {s.category for s in tile.select(Split.TRAIN, ["tile", "wood"])} == {"tile", "wood"}
    assert {s.category for s in tile.select(Split.TRAIN, "wood")} == {"wood"}
    for unknown in ("oak", ["tile", "oak"], []):
        with pytest.raises(
            ConfigError, match=r"(?s)data\.category of.* ('oak'|nothing),.*from: tile, wood; .*=all"
        ):
            tile.select(Split.TRAIN, unknown)


def test_one_class_is_normal_and_the_others_are_defects(pets):
    train = pets.select(Split.TRAIN, normal_class="dog", val_fraction=0)
    assert {(s.class_name, s.gt_label) for s in train} == {("dog", 0)}
    test = pets.select(Split.TEST, normal_class="dog")
    assert {(s.class_name, s.gt_label, s.defect_type) for s in test} == {
        ("dog", 0, None),
        ("cat", 1, "cat"),
    }


def test_a_normal_class_is_wanted_where_there_are_classes_and_only_there(tile, pets):
    with pytest.raises(ConfigError, match=r"(?s)normal_class is missing.*choose from: cat, dog"):
        pets.select(Split.TRAIN)
    with pytest.raises(ConfigError, match="'cow', which is unknown"):
        pets.select(Split.TRAIN, normal_class="cow")
    with pytest.raises(ConfigError, match=r"remove data\.normal_class"):
        tile.select(Split.TRAIN, normal_class="cat")


def test_the_fingerprint_follows_the_content(tmp_path):
    one = write(tmp_path, [sample("a"), sample("b")])
    assert write(tmp_path, [sample("a"), sample("b")]).fingerprint == one.fingerprint
    assert write(tmp_path, [sample("a"), sample("c")]).fingerprint != one.fingerprint
    changed = replace(sample("b"), image=replace(MEMBER, sha256="1" * 64))
    assert write(tmp_path, [sample("a"), changed]).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (INDEX_FILE, b'"version": 1', b'"version": 7', "version 7; this program reads version 1"),
        (INDEX_FILE, b'"image_size": 32', b'"image_size": 64', "its own fingerprint"),
        (INDEX_FILE, b"{", b"[", "not a shard index"),
        (SAMPLES_FILE, b"tile", b"tilt", "does not match the hash"),
    ],
)
def test_a_changed_index_is_refused(tile, file, old, new, message):
    path = f"{tile.root}/{file}"
    with open(path, "rb") as source:
        content = source.read()
    with open(path, "wb") as target:
        target.write(content.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        Index.read(tile.root)


def test_a_folder_without_an_index_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"(?s)index\.json cannot be read.*kdad pack"):
        Index.read(str(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        Index.read("http://127.0.0.1:9/none")
