"""Folders of images are recognised by their names, and images and masks paired by theirs."""

import csv
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from kdad_dist.data.index import Split
from kdad_dist.data.layouts import scan
from kdad_dist.data.records import make_key
from kdad_dist.data.visa import COLUMNS
from kdad_dist.errors import DataError, UsageError
from tests.helpers import make_mvtec


def touch(root: Path, *names: str) -> Path:
    """Empty files: a scan opens no image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_table(root: Path, *rows: tuple[str, str, str, str, str], name="split_csv/1cls.csv"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with open(root / name, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def make_visa(root: Path) -> Path:
    rows = []
    for category in ("candle", "pcb1"):
        for i, split in enumerate(("train", "train", "test")):
            rows.append((category, split, "normal", f"{category}/Data/Images/Normal/{i}.JPG", ""))
        image, mask = (
            f"{category}/Data/{part}" for part in ("Images/Anomaly/0", "Masks/Anomaly/0")
        )
        rows.append((category, "test", "anomaly", f"{image}.JPG", f"{mask}.png"))
    touch(root, *(file for row in rows for file in row[3:] if file))
    write_table(root, *rows)
    return root


def kinds(result) -> Counter:
    return Counter((str(r.split), r.defect_type, r.gt_label, r.mask is not None) for r in result)


def test_mvtec_is_recognised_with_the_reason(tmp_path):
    result = scan(make_mvtec(tmp_path))
    assert (result.layout, result.reason) == ("mvtec", "tile/train/good exists")
    assert kinds(result.records) == {
        ("train", None, 0, False): 6,
        ("test", None, 0, False): 3,
        ("test", "scratch", 1, True): 4,
    }
    assert {r.category for r in result.records} == {"tile"}
    defect = next(r for r in result.records if r.defect_type)
    assert defect.key == "tile/test/scratch/000"
    assert defect.mask == tmp_path / "tile/ground_truth/scratch/000_mask.png"


def test_a_folder_of_categories_gives_the_keys_of_each_alone(tmp_path):
    make_mvtec(tmp_path, "tile")
    make_mvtec(tmp_path, "wood")
    both = scan(tmp_path)
    assert both.layout == "mvtec"
    assert {r.category for r in both.records} == {"tile", "wood"}
    assert scan(tmp_path / "tile").records == [r for r in both.records if r.category == "tile"]
    assert scan(tmp_path, categories=["tile"]).records == scan(tmp_path / "tile").records


def test_an_unknown_category_is_refused_with_the_choices(tmp_path):
    make_mvtec(tmp_path, "tile")
    make_mvtec(tmp_path, "wood")
    with pytest.raises(UsageError, match=r"(?s)no category wod.*choose from: tile, wood"):
        scan(tmp_path, categories=["wod"])


def test_the_name_of_a_category_does_not_depend_on_how_its_path_is_written(tmp_path, monkeypatch):
    folder = make_mvtec(tmp_path)
    monkeypatch.chdir(folder)
    assert scan(Path()).records == scan(folder).records == scan(folder / "test" / "..").records


def test_refoldered_good_and_bad_find_their_masks_and_defect_types(tmp_path):
    touch(
        tmp_path / "tile",
        "train/good/0.png",
        "test/good/0.png",
        "test/bad/crack_000.png",
        "test/bad/crack_deep_000.png",
        "ground_truth/crack/000_mask.png",
        "ground_truth/crack_deep/000_mask.png",
    )
    result = scan(tmp_path)
    assert not result.faults
    found = {r.path.name: (r.defect_type, r.mask.parent.name) for r in result.records if r.mask}
    assert found == {
        "crack_000.png": ("crack", "crack"),
        "crack_deep_000.png": ("crack_deep", "crack_deep"),
    }


def test_a_refoldered_image_of_no_known_defect_is_a_fault(tmp_path):
    touch(
        tmp_path / "tile",
        "train/good/0.png",
        "test/bad/crack_000.png",
        "test/bad/hole_000.png",
        "ground_truth/crack/000_mask.png",
    )
    result = scan(tmp_path)
    assert [path.name for path, _ in result.faults] == ["hole_000.png"]


def test_bad_may_be_a_defect_type_of_its_own(tmp_path):
    touch(
        tmp_path / "t",
        "train/good/0.png",
        "test/bad/crack_000.png",
        "ground_truth/bad/crack_000.png",
    )
    defect = next(r for r in scan(tmp_path).records if r.gt_label)
    assert defect.defect_type == "bad"
    assert defect.mask is not None


def test_masks_are_paired_by_name_never_by_order(tmp_path):
    touch(
        tmp_path / "t",
        "train/good/0.png",
        *(f"test/crack/{name}.jpg" for name in ("1", "2", "10", "sub/7")),
        *(f"ground_truth/crack/{name}.png" for name in ("10_mask", "2", "1_mask", "sub/7_mask")),
    )
    result = scan(tmp_path)
    assert not result.faults
    for record in result.records:
        if record.mask:
            assert record.mask.stem.removesuffix("_mask") == record.path.stem


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (["test/crack/1.png"], "has no mask of its name in ground_truth/crack, with or without"),
        (["test/hole/1.png"], "has no mask of its name in ground_truth/hole"),
        (["ground_truth/crack/5_mask.png"], "is a mask without an image"),
        (["ground_truth/crack/0.png"], "has several masks: 0.png and 0_mask.png"),
        (["train/bad/0.png"], "is in train/, but not in train/good"),
        (["test/crack/0.jpg"], "would have the same key, t/test/crack/0, as 0.jpg"),
    ],
)
def test_what_does_not_pair_up_is_a_fault_of_that_file(tmp_path, files, fault):
    touch(tmp_path / "t", "train/good/0.png", "test/crack/0.png", "ground_truth/crack/0_mask.png")
    if "same key" in fault:
        (tmp_path / "t/ground_truth/crack/0_mask.png").unlink()
        (tmp_path / "t/ground_truth/crack").rmdir()
    touch(tmp_path / "t", *files)
    faults = scan(tmp_path, "mvtec").faults
    assert len(faults) == 1
    assert fault in faults[0][1]


def test_a_category_without_any_mask_or_defect_is_fine(tmp_path):
    touch(tmp_path / "a", "train/good/0.png", "test/crack/0.png")
    touch(tmp_path / "b", "train/good/0.png")
    result = scan(tmp_path)
    assert not result.faults
    assert kinds(result.records)[("test", "crack", 1, False)] == 1


def test_a_category_without_train_good_is_named(tmp_path):
    make_mvtec(tmp_path, "tile")
    touch(tmp_path / "wood", "train/god/0.png", "test/crack/0.png")
    with pytest.raises(DataError, match=r"wood holds images but no folder train/good"):
        scan(tmp_path)
    assert scan(tmp_path, categories=["tile"]).records


@pytest.mark.parametrize(
    "files",
    [
        ["test/good/0.png", "test/crack/0.png", "ground_truth/crack/0.png"],
        ["train/0.png", "test/0.png"],
        ["0.png", "1.png"],
        ["train/god/0.png", "test/good/0.png"],
        ["notes.txt"],
        [],
    ],
)
def test_an_unknown_layout_says_what_was_looked_for_and_found(tmp_path, files):
    root = touch(tmp_path / "odd", *files)
    root.mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"odd has no known layout.*holds.*train/good.*\.csv.*good"):
        scan(root)


def test_a_named_layout_that_is_not_there_is_refused(tmp_path):
    make_mvtec(tmp_path)
    with pytest.raises(DataError, match="has no layout visa"):
        scan(tmp_path, "visa")


def test_an_ambiguous_folder_wants_to_be_told(tmp_path):
    touch(tmp_path, "train/good/0.png", "train/bad/0.png", "test/good/0.png", "test/bad/0.png")
    with pytest.raises(DataError, match=r"may be mvtec, because .*, or classes, because"):
        scan(tmp_path)
    assert {r.class_name for r in scan(tmp_path, "classes").records} == {"good", "bad"}
    assert {r.defect_type for r in scan(tmp_path, "mvtec").records} == {None, "bad"}


def test_a_missing_root_and_a_file_as_root_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=rf"does not exist\n.*mean {tmp_path}/photos\? give"):
        scan(tmp_path / "photo")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        scan(tmp_path / "file")


def test_an_unreadable_root_is_refused(open_folder, as_unprivileged):
    folder = make_mvtec(open_folder)
    (folder / "test").chmod(0)
    with pytest.raises(DataError, match=r"tile cannot be read.*Permission denied"):
        scan(folder)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "tile/train/good").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no image"):
        scan(tmp_path / "tile")


def test_visa_follows_its_table(tmp_path):
    result = scan(make_visa(tmp_path))
    assert (result.layout, result.faults) == ("visa", [])
    assert "split_csv/1cls.csv" in result.reason
    assert kinds(result.records) == {
        ("train", None, 0, False): 4,
        ("test", None, 0, False): 2,
        ("test", "anomaly", 1, True): 2,
    }
    defect = next(r for r in result.records if r.gt_label and r.category == "pcb1")
    assert defect.key == "pcb1/Data/Images/Anomaly/0"
    assert defect.mask == tmp_path / "pcb1/Data/Masks/Anomaly/0.png"
    assert {r.category for r in scan(tmp_path, categories=["candle"]).records} == {"candle"}


def test_of_several_tables_the_one_class_split_counts(tmp_path):
    make_visa(tmp_path)
    write_table(tmp_path, name="split_csv/2cls_fewshot.csv")
    assert len(scan(tmp_path).records) == 8
    (tmp_path / "split_csv/1cls.csv").rename(tmp_path / "split_csv/other.csv")
    with pytest.raises(DataError, match=r"several split tables: .*2cls_fewshot\.csv.*other\.csv"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (("c", "train", "normal", "c/missing.png", ""), r"does not exist \(line 4"),
        (("c", "val", "normal", "c/0.png", ""), "neither train nor test"),
        (("c", "test", "anomaly", "c/0.png", ""), "has no mask, unlike others"),
        (("c", "test", "anomaly", "c/0.png", "c/none.png"), "its mask c/none.png does not exist"),
        (("c", "test", "normal", "../../etc/0.png", ""), "points out of the folder"),
        (("c", "test", "normal", "/etc/0.png", ""), "points out of the folder"),
        (("c", "test", "", "c/0.png", ""), "label or object is empty"),
        (("c", "train", "normal", "c/2.png", ""), "would have the same key, c/2"),
    ],
)
def test_a_wrong_row_of_the_table_is_a_fault_of_that_line(tmp_path, row, fault):
    touch(tmp_path, "c/0.png", "c/1.png", "c/2.png", "c/1_mask.png")
    good = ("c", "train", "normal", "c/2.png", "")
    write_table(tmp_path, good, ("c", "test", "anomaly", "c/1.png", "c/1_mask.png"), row)
    result = scan(tmp_path)
    [(path, reason)] = result.faults
    assert re.search(fault, reason)
    assert path.is_relative_to(tmp_path)
    assert len(result.records) == 2


def test_a_pipe_that_looks_like_a_table_is_not_waited_for(tmp_path):
    make_visa(tmp_path)
    os.mkfifo(tmp_path / "pipe.csv")
    assert len(scan(tmp_path).records) == 8


def test_a_plain_folder_is_split_by_a_hash_of_the_key(tmp_path):
    root = touch(tmp_path / "nuts", *(f"good/{i:03}.jpg" for i in range(100)))
    touch(root, "cut/0.png", "hole/0.png", "readme.txt", ".hidden/0.png", "good/._0.png")
    result = scan(root)
    assert (result.layout, result.reason) == ("folder", "nuts/good exists")
    found = kinds(result.records)
    assert found[("test", "cut", 1, False)] == found[("test", "hole", 1, False)] == 1
    test = {r.key for r in result.records if r.split is Split.TEST and r.gt_label == 0}
    assert 12 <= len(test) <= 28
    assert len(result.records) == 102
    (root / "good/050.jpg").unlink()
    touch(root, "good/new.jpg")
    again = {r.key for r in scan(root).records if r.split is Split.TEST and r.gt_label == 0}
    assert test ^ again <= {"nuts/good/050", "nuts/good/new"}


def test_the_test_part_of_a_plain_folder_leaves_validation_its_share(tmp_path):
    from kdad_dist.data.index import held_out_keys

    root = touch(tmp_path / "nuts", *(f"good/{i:03}.jpg" for i in range(200)))
    train = [r.key for r in scan(root).records if r.split is Split.TRAIN]
    assert 0.1 < len(held_out_keys(train, 0.2)) / len(train) < 0.3


def test_masks_of_a_plain_folder_are_optional_but_all_or_none(tmp_path):
    root = touch(tmp_path / "nuts", "good/0.jpg", "cut/0.png", "ground_truth/cut/0_mask.png")
    assert kinds(scan(root).records)[("test", "cut", 1, True)] == 1
    touch(root, "hole/0.png")
    assert [path.name for path, _ in scan(root).faults] == ["0.png"]


def test_an_image_folder_of_classes_keeps_its_classes(tmp_path):
    root = touch(tmp_path / "pets", *(f"{s}/{c}/0.png" for s in ("train", "test") for c in "ab"))
    result = scan(root)
    assert result.layout == "classes"
    assert Counter((str(r.split), r.class_name) for r in result.records) == {
        (split, name): 1 for split in ("train", "test") for name in "ab"
    }
    assert {(r.category, r.gt_label, r.defect_type) for r in result.records} == {
        ("pets", None, None)
    }


def test_all_of_a_few_classes_are_named_and_of_many_how_many_there_are(tmp_path):
    few = touch(tmp_path / "few", *(f"train/{name}/0.png" for name in ("cat", "dog", "ship")))
    assert scan(few).reason == "the folders cat, dog and ship in train hold images"
    many = touch(tmp_path / "many", *(f"{name}/0.png" for name in "abcdefg"))
    assert scan(many).reason == "the folders a, b, c and 4 more in many hold images"


def test_classes_without_a_split_are_training_data(tmp_path):
    root = touch(tmp_path / "pets", "cat/0.png", "dog/0.png")
    assert [(str(r.split), r.class_name) for r in scan(root).records] == [
        ("train", "cat"),
        ("train", "dog"),
    ]


def test_val_is_the_test_split_where_there_is_no_test(tmp_path):
    root = touch(tmp_path / "pets", "train/a/0.png", "train/b/0.png", "val/a/1.png")
    assert sum(r.split is Split.TEST for r in scan(root).records) == 1
    touch(root, "test/a/2.png")
    result = scan(root)
    assert [r.path.name for r in result.records if r.split is Split.TEST] == ["2.png"]
    assert result.unused == [root / "val"]


def test_folders_without_a_use_are_told(tmp_path):
    folder = make_mvtec(tmp_path)
    touch(folder, "validation/good/0.png", "docs/readme.txt")
    assert scan(folder).unused == [folder / "validation"]


def test_dots_in_names_do_not_merge_samples(tmp_path):
    touch(tmp_path / "t.v1", "train/good/good.v2.000.png", "train/good/good.v2.001.png")
    assert [r.key for r in scan(tmp_path).records] == [
        "t%2Ev1/train/good/good%2Ev2%2E000",
        "t%2Ev1/train/good/good%2Ev2%2E001",
    ]


def test_escaping_is_one_to_one_and_readable():
    names = ["a.b", "a%2Eb", "a%252Eb", "a b", "a\tb", "a\\b", "ä", "a\u0308", "a\udcffb", "漢字"]
    keys = {make_key(Path(f"{name}.png")) for name in names}
    assert len(keys) == len(names)
    assert {"a b", "ä", "漢字"} <= keys
    assert all("." not in key and key.isprintable() for key in keys)
    assert make_key(Path("__t__/0.png")) == "%5F_t__/0"


def test_undecodable_file_names_are_kept_and_such_folders_refused(tmp_path):
    folder = touch(tmp_path / "t", "train/good/0.png")
    os.close(os.open(bytes(folder) + b"/train/good/\xff.png", os.O_CREAT))
    assert [r.key for r in scan(folder).records] == ["t/train/good/%FF", "t/train/good/0"]
    os.makedirs(bytes(folder) + b"/test/\xfe")
    os.close(os.open(bytes(folder) + b"/test/\xfe/1.png", os.O_CREAT))
    assert "cannot be printed" in scan(folder).faults[0][1]


def test_formats_that_are_not_decoded_are_not_overlooked(tmp_path):
    touch(tmp_path / "t", "train/good/0.gif", "train/good/1.heic", "train/good/Thumbs.db")
    assert [r.path.name for r in scan(tmp_path).records] == ["0.gif", "1.heic"]


def test_the_real_data_sets_are_recognised(shared_data):
    found = {name: scan(shared_data / name) for name in ("magnetic_tile", "hazelnut")}
    assert {name: result.layout for name, result in found.items()} == {
        "magnetic_tile": "mvtec",
        "hazelnut": "mvtec",
    }
    assert not any(result.faults for result in found.values())
    assert all(r.mask for result in found.values() for r in result.records if r.gt_label)
    assert scan(shared_data / "cifar10_subset").layout == "classes"
