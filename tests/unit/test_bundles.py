"""CIFAR-10, MNIST and Fashion-MNIST are packed from their published files; nothing in them runs."""

import gzip
import os
import pickle
import random
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kdad_dist.data import cifar
from kdad_dist.data.image import decode_image, load_image, resize_image
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.layouts import scan
from kdad_dist.data.records import Unusable
from kdad_dist.data.verify import verify
from kdad_dist.data.writer import pack
from kdad_dist.errors import ConfigError, DataError
from tests.bundles import (
    CIFAR_FILES,
    CLASSES,
    cifar_rows,
    idx,
    make_cifar_binary,
    make_cifar_python,
    make_mnist,
    python2_pickle,
    write_idx,
)
from tests.helpers import save_image, texture

FASHION_TRAIN = (9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 8)
FASHION_TEST = (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def image_of(out: Path, sample: Sample) -> bytes:
    data = (out / sample.shard).read_bytes()
    return data[sample.image.offset :][: sample.image.size]


def only_fault(root: Path) -> tuple[str, str]:
    [(path, reason)] = scan(root).faults
    return path.name, reason


@pytest.mark.parametrize("make", [make_cifar_python, make_cifar_binary])
def test_cifar_is_packed_without_loss(tmp_path, make, monkeypatch):
    monkeypatch.setattr(cifar, "IMAGES", 4)
    result = pack(make(tmp_path / "cifar"), tmp_path / "out", size=0)
    kind = "python" if make is make_cifar_python else "binary"
    suffix = "" if kind == "python" else ".bin"
    assert result.layout == "classes"
    assert result.reason == f"cifar holds data_batch_1{suffix} of CIFAR-10 ({kind} version)"
    assert result.counts == {
        "train": {"cifar": dict.fromkeys(CLASSES, 5)},
        "test": {"cifar": dict.fromkeys(CLASSES, 1)},
    }
    index = Index.read(str(tmp_path / "out"))
    assert verify(str(tmp_path / "out"), decode=True) == []
    samples = {sample.key: sample for sample in index.samples}
    for number, file in enumerate(CIFAR_FILES):
        rows, labels = cifar_rows(number)
        for at, (row, label) in enumerate(zip(rows, labels, strict=True)):
            split = Split.TEST if file == "test_batch" else Split.TRAIN
            sample = samples.pop(f"cifar/{split}/{CLASSES[label]}/{file}-{at:05}")
            assert (sample.class_name, sample.gt_label) == (CLASSES[label], None)
            assert (sample.split, sample.image.ext) == (split, "png")
            pixels = decode_image(image_of(tmp_path / "out", sample), "")
            for channel in range(3):  # a row is the red plane, then green, then blue
                plane = row[1024 * channel :][:1024].reshape(32, 32)
                np.testing.assert_array_equal(pixels[..., channel], plane)
    assert not samples


def test_both_versions_of_cifar_and_newer_pickles_give_the_same_bytes(tmp_path):
    pack(make_cifar_binary(tmp_path / "binary/cifar"), tmp_path / "out")
    for name, protocol in (("old", None), ("three", 3), ("four", 4)):
        root = make_cifar_python(tmp_path / name / "cifar", protocol)
        pack(root, tmp_path / "out" / name, size=40)
        assert content(tmp_path / "out" / name) == content(tmp_path / "out/old")
    (tmp_path / "again").mkdir()
    pack(tmp_path / "binary/cifar", tmp_path / "again/binary", size=40)
    assert content(tmp_path / "again/binary") == content(tmp_path / "out/old")


def test_the_generated_batches_are_those_that_numpy_reads(tmp_path):
    root = make_cifar_python(tmp_path / "cifar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy has moved the function that old pickles name
        batch = pickle.loads((root / "data_batch_2").read_bytes(), encoding="latin1")
    rows, labels = cifar_rows(1)
    np.testing.assert_array_equal(batch["data"], rows)
    assert batch["labels"] == labels


def test_a_batch_in_the_order_of_fortran_is_read_alike(tmp_path):
    rows, labels = cifar_rows(0)
    for name, order in (("c", "C"), ("f", "F")):
        batch = {"data": np.asarray(rows, order=order), "labels": labels}
        (tmp_path / name).write_bytes(python2_pickle(batch))
    (one, _), (other, _) = (cifar.read_python(tmp_path / name) for name in "cf")
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("suffix", "mark"), [("", "-"), (".gz", "-"), ("", "."), (".gz", ".")])
def test_mnist_is_packed_grey_and_without_loss(tmp_path, suffix, mark):
    root = make_mnist(tmp_path / "digits", suffix=suffix, mark=mark)
    result = pack(root, tmp_path / "out", size=0)
    assert result.reason == (
        f"digits holds train-images{mark}idx3-ubyte{suffix} of MNIST or a data set of its form"
    )
    assert result.counts["train"] == {
        "digits": {"0": 1, "1": 3, "2": 1, "3": 2, "4": 2, "5": 2, "9": 1}
    }
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    samples = {sample.key: sample for sample in Index.read(str(tmp_path / "out")).samples}
    data = image_of(tmp_path / "out", samples["digits/train/9/train-00004"])
    stored, _ = load_image(data, "")
    assert stored.mode == "L"
    np.testing.assert_array_equal(np.asarray(stored), images[4])
    np.testing.assert_array_equal(decode_image(data, ""), np.repeat(images[4][..., None], 3, -1))
    assert "digits/test/7/t10k-00000" in samples


def test_packed_or_unpacked_and_under_either_name_mnist_gives_the_same_bytes(tmp_path):
    for number, (suffix, mark) in enumerate((("", "-"), (".gz", "."))):
        root = make_mnist(tmp_path / str(number) / "digits", suffix=suffix, mark=mark)
        pack(root, tmp_path / f"out{number}", size=16, workers=1 + number)
    assert content(tmp_path / "out0") == content(tmp_path / "out1")
    # A downloader may leave both behind.
    make_mnist(tmp_path / "0/digits", suffix=".gz")
    assert pack(tmp_path / "0/digits", tmp_path / "out0", size=16).unchanged


def test_images_are_resized_as_those_of_other_layouts(tmp_path):
    pack(make_cifar_python(tmp_path / "cifar"), tmp_path / "out", size=48)
    rows, labels = cifar_rows(5)
    key = f"cifar/test/{CLASSES[labels[0]]}/test_batch-00000"
    sample = next(s for s in Index.read(str(tmp_path / "out")).samples if s.key == key)
    expected = resize_image(np.ascontiguousarray(rows[0].reshape(3, 32, 32).transpose(1, 2, 0)), 48)
    np.testing.assert_array_equal(decode_image(image_of(tmp_path / "out", sample), ""), expected)


def test_fashion_is_told_from_digits_by_its_first_labels(tmp_path):
    result = scan(make_mnist(tmp_path / "data", train=FASHION_TRAIN, test=FASHION_TEST))
    assert result.reason.endswith("and its labels begin as those of Fashion-MNIST")
    found = Counter(r.class_name for r in result.records if r.split is Split.TRAIN)
    assert found["T-shirt"] == 3
    assert found["Ankle boot"] == found["Bag"] == 1
    # Either file is enough, where the other cannot be used.
    (tmp_path / "data/train-labels-idx1-ubyte").unlink()
    left = scan(tmp_path / "data")
    assert [path.name for path, _ in left.faults] == ["train-labels-idx1-ubyte"]
    assert {"Sneaker", "Shirt"} < {r.class_name for r in left.records}


def test_files_are_found_one_folder_deeper_and_the_category_is_the_folder_given(tmp_path):
    make_mnist(tmp_path / "MNIST/raw", suffix=".gz")
    result = scan(tmp_path / "MNIST")
    assert result.reason.startswith("raw holds train-images-idx3-ubyte.gz of MNIST")
    assert {record.category for record in result.records} == {"MNIST"}


def test_several_data_sets_below_one_folder_want_to_be_told_apart(tmp_path):
    make_cifar_python(tmp_path / "in/py")
    make_cifar_binary(tmp_path / "in/bin")
    with pytest.raises(DataError, match=r"python version\) in .*/py|give the folder") as error:
        scan(tmp_path / "in")
    assert "CIFAR-10 (binary version) in" in str(error.value)
    make_mnist(tmp_path / "other")
    for name in "ab":
        save_image(tmp_path / f"other/train/{name}/0.png", texture(0))
    with pytest.raises(DataError, match=r"holds train-images.* but the folders a and b in train"):
        scan(tmp_path / "other")


def test_packing_twice_does_nothing_and_a_changed_pixel_or_label_is_noticed(tmp_path):
    root = make_cifar_binary(tmp_path / "cifar")
    pack(root, tmp_path / "out", size=0)
    assert pack(root, tmp_path / "out", size=0).unchanged
    data = bytearray((root / "data_batch_3.bin").read_bytes())
    data[1] ^= 1
    (root / "data_batch_3.bin").write_bytes(data)
    with pytest.raises(DataError, match="content or the label of an image"):
        pack(root, tmp_path / "out", size=0)
    data[0] = 0 if data[0] else 1
    (root / "data_batch_3.bin").write_bytes(data)
    with pytest.raises(DataError, match="1 image is new"):
        pack(root, tmp_path / "out", size=0)


def test_an_interrupted_pack_goes_on_to_the_same_bytes_with_any_number_of_workers(tmp_path):
    root = make_mnist(tmp_path / "digits")
    pack(root, tmp_path / "whole", size=0, workers=3, samples_per_shard=2)

    def stop(done: int, total: int) -> None:
        if len(list((tmp_path / "out").glob("*.tar"))) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(root, tmp_path / "out", size=0, workers=1, samples_per_shard=2, progress=stop)
    assert pack(root, tmp_path / "out", size=0, samples_per_shard=2).resumed >= 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class Hostile:
    """Would make a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, protocol, file):
    root = make_cifar_python(tmp_path / "cifar")
    hostile = {"data": Hostile(tmp_path / "pwned"), "labels": []}
    (root / file).write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(DataError, match=rf"{file} .*posix\.mkdir.*binary version") as error:
        pack(root, tmp_path / "out", size=0)
    assert "nothing was run" in error.value.problem
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"cbuiltins\neval\n(S'1/0'\ntR.", "asks for builtins.eval"),
        (b"cnumpy\nload\n(S'/etc/passwd'\ntR.", "asks for numpy.load"),
        (b"(S'rm'\nios\nsystem\n.", "asks for os.system"),
        # What is known is not called either: this array would take 7 TB.
        (
            b"}(U\x04datacnumpy\nndarray\n(\x8a\x06\x00\x00\x00\x00\x00\x01\x85tRu.",
            "no entry data that is an array",
        ),
        (b"\x80\x02}r\xff\xff\xff\xf0.", "numbers an object"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00}.", "not a whole pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00x.", "not a whole pickle"),
        (b"\x80\x02].", "not one of a dictionary"),
        (b"", "holds 0 bytes"),
    ],
)
def test_a_pickle_can_ask_for_nothing_and_take_no_memory(tmp_path, text, reason):
    root = make_cifar_python(tmp_path / "cifar")
    (root / "data_batch_4").write_bytes(text)
    assert re.search(reason, only_fault(root)[1])


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({}, "has no entry data"),
        ({"data": "x" * 3072, "labels": [0]}, "has no entry data"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}, "n x 3,072 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "has 1 labels for 2 images"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "has no entry labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [1]}, "has no entry labels"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "holds no image"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 4]},
            "says that image 1 is of class 4, but the last of the 4 is 3",
        ),
    ],
)
def test_a_batch_of_something_else_is_named_with_what_is_wrong(tmp_path, batch, reason):
    root = make_cifar_python(tmp_path / "cifar")
    (root / "test_batch").write_bytes(python2_pickle(batch))
    assert only_fault(root)[0] == "test_batch"
    assert reason in only_fault(root)[1]
    (root / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, 4))
    assert "has no entry data" in only_fault(root)[1]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_batches_never_raise_anything_else(tmp_path):
    rows, labels = cifar_rows(0, 2)
    whole = python2_pickle({"labels": labels, "data": rows[:, :3072]})
    draw, path = random.Random(0), tmp_path / "batch"
    edges = [*range(60), *range(len(whole) - 160, len(whole))]
    refused = 0
    for trial in range(600):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            # Where the structure is; between stand pixels, of which any are right.
            data[draw.choice(edges) if trial % 3 == 1 else draw.randrange(300)] = draw.randrange(
                256
            )
        path.write_bytes(data)
        try:
            cifar.read_python(path)
        except Unusable as error:
            refused += 1
            assert error.path == path
    assert refused > 300


@pytest.mark.parametrize("cut", [0, 2, 15, 16, 4000])
def test_a_truncated_idx_file_is_named_with_what_was_expected_and_found(tmp_path, cut):
    root = make_mnist(tmp_path / "digits")
    path = root / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    name, reason = only_fault(root)
    assert name == path.name
    expected = "holds {} bytes, not the 9,424 that its header announces (12 x 28 x 28)"
    if cut < 16:
        assert f"holds {cut} bytes" in reason
        assert "begins with 00 00 08 03" in reason
    else:
        assert reason == expected.format(f"{cut:,}")
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        pack(root, tmp_path / "out")


def test_a_truncated_or_damaged_gzip_file_is_named(tmp_path):
    root = make_mnist(tmp_path / "digits", suffix=".gz")
    path = root / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    cut = r"is cut short: its 3,\d{3} bytes are not a whole gzip file, and hold 3,\d{3} bytes of"
    assert re.match(cut, only_fault(root)[1])
    for bytes_left in (0, 5, len(whole) - 4):
        path.write_bytes(whole[:bytes_left])
        assert only_fault(root)[1].startswith(f"is cut short: its {bytes_left:,} bytes are not a")
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    assert "incorrect data check" in only_fault(root)[1]
    path.write_bytes(whole + whole)
    assert "behind its end" in only_fault(root)[1]
    path.write_bytes(b"<html>Not found</html>")
    assert "is not a sound gzip file" in only_fault(root)[1]
    # The header may announce anything; only what is there is read.
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12))
    assert "holds 16 bytes, not the 79,228," in only_fault(root)[1]


def test_idx_files_that_do_not_fit_are_named(tmp_path):
    root = make_mnist(tmp_path / "digits")
    write_idx(root / "train-labels-idx1-ubyte", np.zeros(11, np.uint8))
    assert only_fault(root) == (
        "train-labels-idx1-ubyte",
        "has 11 labels, but train-images-idx3-ubyte 12 images",
    )
    write_idx(root / "train-labels-idx1-ubyte", np.array([0] * 11 + [12], np.uint8))
    assert "image 11 is of class 12, but the last of the 10 is 9" in only_fault(root)[1]
    (root / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros((12, 1), np.uint8)))
    assert only_fault(root)[1].startswith("begins with 00 00 08 02 and holds 24 bytes")


def test_a_truncated_binary_batch_is_named_and_not_left_out(tmp_path):
    root = make_cifar_binary(tmp_path / "cifar")
    path = root / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[:-1])
    said = (
        r"(?s)data_batch_5\.bin holds 12,291 bytes, not a multiple of .*fetch what is named again"
    )
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=said):
            pack(root, tmp_path / "out", skip_bad=skip_bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [make_cifar_python, make_cifar_binary])
def test_files_of_cifar_that_hold_other_numbers_than_the_published_are_told(tmp_path, make):
    reason = scan(make(tmp_path / "cifar")).reason
    first = "data_batch_1" if make is make_cifar_python else "data_batch_1.bin"
    assert reason.endswith(
        f"; not as published, 10,000 images in each file: {first} has 4 and 5 more"
    )


def test_a_binary_batch_cut_between_two_images_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "IMAGES", 4)
    path = make_cifar_binary(tmp_path / "cifar") / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[: -(1 + cifar.PIXELS)])
    reason = scan(path.parent).reason
    assert reason.endswith("; not as published, 4 images in each file: data_batch_5.bin has 3")


def test_missing_files_are_named(tmp_path):
    root = make_cifar_binary(tmp_path / "cifar")
    (root / "data_batch_1.bin").unlink()
    assert only_fault(root) == ("data_batch_1.bin", "is missing beside the others")
    (root / "batches.meta.txt").unlink()
    with pytest.raises(DataError, match=r"batches\.meta\.txt is missing"):
        scan(root)
    for names in ("", "cat\ncat\n", "../cat\ndog\n", "c\0t\n"):
        (root / "batches.meta.txt").write_text(names)
        with pytest.raises(DataError, match="names its classes"):
            scan(root)
    digits = make_mnist(tmp_path / "digits")
    for file in ("t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        (digits / file).unlink()
        assert only_fault(digits) == (file, "is missing beside the others")


def test_class_names_of_a_hostile_file_cannot_lead_out_of_the_shards(tmp_path):
    root = make_cifar_binary(tmp_path / "cifar")
    (root / "batches.meta.txt").write_text("..\na.b\nc\nd\n")
    pack(root, tmp_path / "out")
    keys = {sample.key.split("/")[2] for sample in Index.read(str(tmp_path / "out")).samples}
    assert keys == {"%2E%2E", "a%2Eb", "c", "d"}


def test_a_class_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    pack(make_cifar_binary(tmp_path / "cifar"), tmp_path / "out")
    index = Index.read(str(tmp_path / "out"))
    assert len(index.select(Split.TRAIN, normal_class="automobile", val_fraction=0)) == 5
    for wrong, answer in (("Airplane", "airplane"), ("automobil", "automobile")):
        with pytest.raises(ConfigError, match=rf"did you mean {answer}\? choose from: airplane, "):
            index.select(Split.TRAIN, normal_class=wrong)
    with pytest.raises(ConfigError, match=r"'9', which is unknown(?s:.*)-> choose from: airplane"):
        index.select(Split.TRAIN, normal_class="9")


def test_a_class_with_no_images_is_named(tmp_path):
    for name in ("cat", "dog"):
        save_image(tmp_path / f"pets/train/{name}/0.png", texture(0))
    (tmp_path / "pets/train/cow").mkdir()
    assert only_fault(tmp_path / "pets") == ("cow", "is a class with no images")
    result = pack(tmp_path / "pets", tmp_path / "out", skip_bad=True)
    assert result.skipped == [("train/cow", "is a class with no images")]
    assert pack(tmp_path / "pets", tmp_path / "out", skip_bad=True).unchanged
