"""Packing: the bytes depend on the images alone, and survive kills, full disks and bad images."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from kdad_dist.data.image import decode_image, decode_mask, resize_image, resize_mask
from kdad_dist.data.index import INDEX_FILE, SAMPLES_FILE, Index, Split
from kdad_dist.data.layouts import scan
from kdad_dist.data.partition import partition
from kdad_dist.data.shard import PARTIAL, Options, finished, note_of, write_shard
from kdad_dist.data.writer import pack
from kdad_dist.errors import DataError, UsageError
from tests.helpers import header_of_png, make_mvtec, save_image, square_mask, texture
from tests.launcher import wait_for
from tests.needs import REPOSITORY


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with inode, size and time of change."""
    found = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}


def described(out: Path) -> dict:
    return json.loads((out / INDEX_FILE).read_text())


def start_pack(
    root: Path, out: Path, python: str = sys.executable, prepare: str = ""
) -> subprocess.Popen:
    """`pack` in a process of its own, one sample per shard."""
    program = (
        f"import sys; from pathlib import Path\n{prepare}\n"
        "from kdad_dist.data.writer import pack\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), size=64, samples_per_shard=1, workers=2)"
    )
    return subprocess.Popen(
        [python, "-c", program, str(root), str(out)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_index_describes_what_was_packed(tmp_path):
    root = make_mvtec(tmp_path / "in")
    result = pack(root, tmp_path / "out", size=32)
    index = Index.read(str(tmp_path / "out"))
    assert (result.layout, result.reason) == ("mvtec", "tile/train/good exists")
    assert (index.layout, index.image_size, index.resize) == ("mvtec", 32, "squash")
    assert index.categories == ("tile",)
    assert index.fingerprint == result.fingerprint
    assert result.images == len(index.samples) == 13
    assert described(tmp_path / "out")["counts"] == result.counts
    assert result.counts == {
        "train": {"tile": {"good": 6}},
        "test": {"tile": {"good": 3, "scratch": 4}},
    }
    assert [s.key for s in index.samples] == sorted(
        (s.key for s in index.samples), key=lambda key: ("train" in key, key)
    )
    for shard in index.shards:
        data = (tmp_path / "out" / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        assert {s.split for s in index.samples if s.shard == shard.file} == {shard.split}


def test_stored_pixels_are_the_resized_ones_at_the_stated_offsets(tmp_path):
    root = make_mvtec(tmp_path / "in")
    pack(root, tmp_path / "out", size=32)
    for sample in Index.read(str(tmp_path / "out")).samples:
        shard = (tmp_path / "out" / sample.shard).read_bytes()
        source = tmp_path / "in" / f"{sample.key}.png"
        data = shard[sample.image.offset :][: sample.image.size]
        expected = resize_image(decode_image(source.read_bytes(), ""), 32)
        np.testing.assert_array_equal(decode_image(data, ""), expected)
        assert (sample.mask is not None) == (sample.defect_type == "scratch")
        if sample.mask:
            data = shard[sample.mask.offset :][: sample.mask.size]
            expected = resize_mask(square_mask() > 0, 32, 32)
            np.testing.assert_array_equal(decode_mask(data, ""), expected)
            assert set(np.unique(Image.open(io.BytesIO(data)))) == {0, 255}


def test_the_shorter_side_by_option(tmp_path):
    pack(make_mvtec(tmp_path / "in"), tmp_path / "out", size=20, mode="shorter")
    sample = Index.read(str(tmp_path / "out")).samples[-1]
    shard = (tmp_path / "out" / sample.shard).read_bytes()
    assert decode_image(shard[sample.image.offset :][: sample.image.size], "").shape == (20, 24, 3)


def test_size_zero_keeps_the_bytes_and_names_them_by_their_format(tmp_path):
    root = make_mvtec(tmp_path / "in")
    Image.fromarray(texture(9)).save(root / "train/good/photo.JPEG", "JPEG")
    shutil.copy(root / "train/good/photo.JPEG", root / "train/good/misnamed.png")
    pack(root, tmp_path / "out", size=0)
    index = Index.read(str(tmp_path / "out"))
    assert index.image_size is None
    found = {}
    for sample in index.samples:
        shard = (tmp_path / "out" / sample.shard).read_bytes()
        data = shard[sample.image.offset :][: sample.image.size]
        found[sample.key] = (sample.image.ext, hashlib.sha256(data).hexdigest())
    for file in [*(root / "train").rglob("*.*"), *(root / "test").rglob("*.*")]:
        key = str(file.relative_to(tmp_path / "in").with_suffix(""))
        ext = "jpg" if file.stem in {"photo", "misnamed"} else "png"
        assert found[key] == (ext, hashlib.sha256(file.read_bytes()).hexdigest())


def test_webdataset_itself_reads_the_shards(tmp_path):
    root = make_mvtec(tmp_path / "in", category="good.v2 für Ä")
    for i in range(2):
        save_image(root / f"train/good/good.v2.{i:03}.png", texture(i))
        save_image(root / f"train/good/{'very long ' * 20}{i}.png", texture(i))
    pack(root, tmp_path / "out", size=32, samples_per_shard=4)
    index = Index.read(str(tmp_path / "out"))
    urls = [str(tmp_path / "out" / shard.file) for shard in index.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    read = {sample["__key__"]: sample for sample in dataset}
    assert read.keys() == {sample.key for sample in index.samples}
    assert len(read) == 17
    for sample in index.samples:
        entry = read[sample.key]
        assert entry["png"].shape == (32, 32, 3)
        assert ("mask.png" in entry) == (sample.gt_label == 1)
        assert entry["json"] == {
            "category": sample.category,
            "class_name": None,
            "defect_type": sample.defect_type,
            "gt_label": sample.gt_label,
            "split": str(sample.split),
        }
        if sample.gt_label:
            np.testing.assert_array_equal(
                entry["mask.png"][..., 0] > 0, resize_mask(square_mask() > 0, 32, 32)
            )


def test_members_carry_nothing_of_the_machine(tmp_path):
    pack(make_mvtec(tmp_path / "in"), tmp_path / "out", size=32)
    for shard in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(shard) as tar:
            facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, oct(m.mode)) for m in tar}
        assert facts == {(0, 0, 0, "", "", "0o644")}


def test_the_bytes_do_not_depend_on_workers_place_or_times(tmp_path):
    root = make_mvtec(tmp_path / "in", train=40)
    pack(root, tmp_path / "one", size=32, workers=1, samples_per_shard=3)
    moved = shutil.copytree(tmp_path / "in", tmp_path / "elsewhere")
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    for workers in (2, 5):
        out = tmp_path / str(workers)
        pack(moved / "tile", out, size=32, workers=workers, samples_per_shard=3)
        assert content(out) == content(tmp_path / "one")


def test_one_category_is_packed_alike_alone_and_chosen_from_several(tmp_path):
    make_mvtec(tmp_path / "in", "tile")
    make_mvtec(tmp_path / "in", "wood")
    pack(tmp_path / "in", tmp_path / "chosen", size=32, categories=["wood"])
    pack(tmp_path / "in" / "wood", tmp_path / "alone", size=32)
    assert content(tmp_path / "chosen") == content(tmp_path / "alone")
    pack(tmp_path / "in", tmp_path / "both", size=32)
    assert Index.read(str(tmp_path / "both")).categories == ("tile", "wood")
    with pytest.raises(UsageError, match="no category oak"):
        pack(tmp_path / "in", tmp_path / "none", categories=["oak"])
    assert not (tmp_path / "none").exists()


def test_root_is_not_modified(tmp_path):
    root = make_mvtec(tmp_path / "in")
    before = state(root)
    pack(root, tmp_path / "out", size=32)
    assert state(root) == before


@pytest.mark.parametrize("inner", ["", "train/good", "shards"])
def test_out_may_not_lie_in_root(tmp_path, inner):
    root = make_mvtec(tmp_path)
    before = state(root)
    with pytest.raises(DataError, match="lies in ROOT"):
        pack(root, root / inner)
    assert state(root) == before


def test_packing_twice_does_nothing_the_second_time(tmp_path):
    root = make_mvtec(tmp_path / "in")
    first = pack(root, tmp_path / "out", size=32)
    before = state(tmp_path / "out")
    second = pack(root, tmp_path / "out", size=32, workers=3)
    assert not first.unchanged
    assert second.unchanged
    assert second.fingerprint == first.fingerprint
    assert state(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (None, {"size": 16}, "image_size is 32, not 16"),
        (None, {"mode": "shorter"}, "resize is squash, not shorter"),
        (None, {"samples_per_shard": 2}, "samples_per_shard is None, not 2"),
        ("train/good/new.png", {}, "1 image is new, such as tile/train/good/new"),
        ("-train/good/000.png", {}, "1 image is gone, such as tile/train/good/000"),
        ("train/good/000.png", {}, "content or the label of an image or mask has changed"),
        ("ground_truth/scratch/000_mask.png", {}, "content or the label of an image or mask"),
    ],
)
def test_a_finished_folder_of_other_data_is_refused_with_the_difference(
    tmp_path, change, options, reason
):
    root = make_mvtec(tmp_path / "in")
    pack(root, tmp_path / "out", size=32)
    before = state(tmp_path / "out")
    if change and change.startswith("-"):
        (root / change[1:]).unlink()
    elif change:
        save_image(root / change, texture(77))
    with pytest.raises(DataError, match=reason):
        pack(root, tmp_path / "out", **{"size": 32, **options})
    assert state(tmp_path / "out") == before


def test_a_finished_folder_that_lost_a_shard_is_not_called_finished(tmp_path):
    root = make_mvtec(tmp_path / "in")
    pack(root, tmp_path / "out", size=32)
    next((tmp_path / "out").glob("*.tar")).unlink()
    with pytest.raises(DataError, match=r"\.tar is damaged or gone"):
        pack(root, tmp_path / "out", size=32)


def test_out_holding_something_else_is_refused_and_untouched(tmp_path):
    root = make_mvtec(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds something else: thesis\.tex"):
        pack(root, tmp_path / "out")
    assert content(tmp_path / "out").keys() == {"thesis.tex"}
    with pytest.raises(DataError, match="is not a folder"):
        pack(root, tmp_path / "out/thesis.tex")


def test_out_may_be_missing_with_its_parents_or_empty(tmp_path):
    root = make_mvtec(tmp_path / "in")
    pack(root, tmp_path / "a/b/c", size=32)
    (tmp_path / "d").mkdir()
    pack(root, tmp_path / "d", size=32)
    assert content(tmp_path / "d") == content(tmp_path / "a/b/c")


def test_an_index_of_another_version_in_out_is_refused(tmp_path):
    root = make_mvtec(tmp_path / "in")
    pack(root, tmp_path / "out", size=32)
    index = described(tmp_path / "out")
    (tmp_path / "out" / INDEX_FILE).write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(DataError, match="version 99; this program reads version 1"):
        pack(root, tmp_path / "out", size=32)


@pytest.mark.parametrize("finished_shards", [1, 7])
def test_a_killed_pack_is_taken_up_and_ends_with_the_same_bytes(tmp_path, finished_shards):
    root = make_mvtec(tmp_path / "in", train=30)
    pack(root, tmp_path / "whole", size=64, samples_per_shard=1)
    out = tmp_path / "out"
    # It goes no further than to be killed in the middle.
    slow = (
        "import kdad_dist.data.shard as s, time; load = s.load_image\n"
        "def slowly(*a):\n"
        f"    while len([*Path(sys.argv[2]).glob('*.tar')]) >= {finished_shards}: time.sleep(60)\n"
        "    return load(*a)\n"
        "s.load_image = slowly"
    )
    process = start_pack(root, out, prepare=slow)
    wait_for(lambda: process.poll() is not None or len([*out.glob("*.tar")]) >= finished_shards)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / INDEX_FILE).exists()
    with pytest.raises(DataError):
        Index.read(str(out))
    kept = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert finished_shards <= len(kept) < 37
    result = pack(root, out, size=64, samples_per_shard=1)
    assert result.resumed >= finished_shards
    assert {path: path.stat().st_ino for path in kept} == kept, "a finished shard was made again"
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("change", ["[]", "null", '"x"', "{}", "samples", "shard", "skipped"])
def test_a_note_of_another_shape_vouches_for_no_shard(tmp_path, change):
    """A file system that a power cut has emptied or mixed up, or another version of the program."""
    root, out = make_mvtec(tmp_path / "in", train=4, good=1, scratch=0), tmp_path / "out"
    [plan, *_] = partition(scan(root).records, 32, None)
    options = Options(root, 32, "squash", skip_bad=False)
    (out / PARTIAL).mkdir(parents=True)
    write_shard(plan, out, options, lambda: None)
    assert finished(plan, out, options)
    note = note_of(out, plan.file)
    broken = {**json.loads(note.read_text()), change: 7}
    note.write_text(json.dumps(broken) if change.isalpha() and change != "null" else change)
    assert finished(plan, out, options) is None


def test_a_pack_killed_at_any_moment_can_be_taken_up(tmp_path, warm_python):
    root = make_mvtec(tmp_path / "in", train=10)
    pack(root, tmp_path / "whole", size=64, samples_per_shard=1)
    # Dies at the n-th rename, the moments at which something changes.
    for moment in (1, 2, 3, 4, 20, 35, 36, 37):
        out = tmp_path / str(moment)
        killer = (
            "import os, signal; count = 0; replace = Path.replace\n"
            "def dying(self, target):\n"
            "    global count; count += 1\n"
            f"    if count == {moment}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return replace(self, target)\n"
            "Path.replace = dying"
        )
        process = start_pack(root, out, warm_python, killer)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"37 renames are expected, not {moment}"
        assert not (out / INDEX_FILE).exists()
        pack(root, out, size=64, samples_per_shard=1)
        assert content(out) == content(tmp_path / "whole")


def test_what_a_kill_right_after_the_index_leaves_is_cleared_away(tmp_path):
    root = make_mvtec(tmp_path / "in")
    pack(root, tmp_path / "out", size=32)
    whole = content(tmp_path / "out")
    (tmp_path / "out" / PARTIAL).mkdir()
    (tmp_path / "out" / PARTIAL / "lock").touch()
    seen = []
    again = pack(root, tmp_path / "out", size=32, progress=lambda *done: seen.append(done))
    assert again.unchanged and seen[-1] == (again.images, again.images)
    assert content(tmp_path / "out") == whole


def interrupted(root: Path, out: Path, skip_bad: bool = False) -> None:
    """Leaves an unfinished pack behind: some shards, no index."""

    def stop(done: int, total: int) -> None:
        if len(list(out.glob("*.tar"))) >= 10:  # all of the test split among them
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(root, out, size=32, samples_per_shard=1, workers=1, skip_bad=skip_bad, progress=stop)
    assert not (out / INDEX_FILE).exists()


def test_an_interrupted_pack_goes_on(tmp_path):
    root = make_mvtec(tmp_path / "in", train=60)
    pack(root, tmp_path / "whole", size=32, samples_per_shard=1)
    interrupted(root, tmp_path / "out")
    assert pack(root, tmp_path / "out", size=32, samples_per_shard=1).resumed >= 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_unfinished_pack_notices_changed_images_and_damaged_shards(tmp_path):
    root = make_mvtec(tmp_path / "in", train=60)
    interrupted(root, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.tar"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    save_image(root / "test/good/000.png", texture(1234))
    (root / "test/good/001.png").unlink()
    pack(root, tmp_path / "whole", size=32, samples_per_shard=1)
    pack(root, tmp_path / "out", size=32, samples_per_shard=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_an_unfinished_pack_skipped_is_not_skipped_without_being_asked(tmp_path):
    root = make_mvtec(tmp_path / "in", train=60)
    (root / "test/good/000.png").write_bytes(b"")
    interrupted(root, tmp_path / "out", skip_bad=True)
    with pytest.raises(DataError, match=r"000\.png is empty"):
        pack(root, tmp_path / "out", size=32, samples_per_shard=1)


def test_an_unfinished_pack_with_other_options_or_files_is_refused(tmp_path):
    root = make_mvtec(tmp_path / "in", train=60)
    interrupted(root, tmp_path / "out")
    with pytest.raises(DataError, match="unfinished pack with other options: image_size was 32"):
        pack(root, tmp_path / "out", size=64, samples_per_shard=1)
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"something else: notes\.txt"):
        pack(root, tmp_path / "out", size=32, samples_per_shard=1)


def test_two_packs_at_once_into_one_folder_are_sound(tmp_path, warm_python):
    root = make_mvtec(tmp_path / "in", train=60)
    pack(root, tmp_path / "whole", size=64, samples_per_shard=1)
    processes = [start_pack(root, tmp_path / "out", warm_python) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert any(process.returncode == 0 for process in processes)
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0 or "another process is packing into" in error
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_progress_counts_every_image_from_the_callers_thread(tmp_path):
    import threading

    seen = []
    root = make_mvtec(tmp_path / "in")
    pack(
        root,
        tmp_path / "out",
        size=32,
        progress=lambda done, total: seen.append((done, total, threading.current_thread())),
    )
    assert seen[-1][:2] == (13, 13)
    assert {thread for *_, thread in seen} == {threading.current_thread()}


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Bad images and what the message says of each."""
    good = io.BytesIO()
    Image.fromarray(texture(0)).save(good, "PNG")
    frames = io.BytesIO()
    Image.fromarray(texture(0)).save(
        frames, "PNG", save_all=True, append_images=[Image.fromarray(texture(1))]
    )
    return {
        "empty": (b"", "is empty"),
        "text": (b"hello, this is a text\n", "is not an image of a known format"),
        "truncated": (good.getvalue()[:-900], "cannot be decoded"),
        "corrupt": (good.getvalue()[:300] + b"\xff" + good.getvalue()[301:], "cannot be decoded"),
        "bomb": (header_of_png(200_000, 200_000), "says it has more than 160,000,000 pixels"),
        "animated": (frames.getvalue(), "holds 2 frames or pages"),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_a_bad_image_stops_the_pack_by_name_and_leaves_nothing(tmp_path, kind):
    data, reason = bad_files()[kind]
    root = make_mvtec(tmp_path / "in")
    (root / "test/scratch/002.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"in/tile/test/scratch/002\.png {reason}"):
        pack(root, tmp_path / "out", size=32, samples_per_shard=100)
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_error_before_the_first_shard_leaves_no_folder(tmp_path):
    root = make_mvtec(tmp_path / "in")
    for path in root.rglob("0*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        pack(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (square_mask(20, 24), r"is a mask of 24 x 20 pixels, but its image .*000\.png has 48 x 40"),
        (np.zeros((40, 48), np.uint8), "marks no pixels of the defective image"),
        (None, "has no mask of its name in ground_truth/scratch"),
    ],
)
def test_a_bad_mask_is_refused_by_name(tmp_path, mask, reason):
    root = make_mvtec(tmp_path / "in")
    file = root / "ground_truth/scratch/000_mask.png"
    file.unlink() if mask is None else save_image(file, mask)
    with pytest.raises(DataError, match=rf"000(_mask)?\.png {reason}"):
        pack(root, tmp_path / "out", size=32)
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    result = pack(root, tmp_path / "out", size=32, skip_bad=True)
    assert [file for file, _ in result.skipped] == ["test/scratch/000.png"]


def test_a_folder_of_defects_without_masks_is_refused_in_a_line_with_every_way_out(tmp_path):
    root = make_mvtec(tmp_path / "in")
    shutil.copytree(root / "test/scratch", root / "test/hole")
    images = len(list((root / "test/hole").iterdir()))
    with pytest.raises(DataError) as refused:
        pack(root, tmp_path / "out", size=32)
    assert refused.value.problem.count("has no mask") == 1
    assert f"hole/000.png (and {images - 1} more in its folder)" in refused.value.problem
    assert "complete ground_truth/, or move it away" in refused.value.remedy
    (root / "ground_truth").rename(tmp_path / "masks")
    assert pack(root, tmp_path / "out", size=32).images


def test_a_mask_belongs_to_the_upright_image(tmp_path):
    root = make_mvtec(tmp_path / "in", scratch=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(texture(0, 48, 40)).save(root / "test/scratch/000.png", exif=exif)
    pack(root, tmp_path / "out", size=0)
    sample = next(s for s in Index.read(str(tmp_path / "out")).samples if s.mask)
    shard = (tmp_path / "out" / sample.shard).read_bytes()
    assert decode_image(shard[sample.image.offset :][: sample.image.size], "").shape[:2] == (40, 48)


def test_skip_bad_lists_what_it_skipped_and_goes_on(tmp_path):
    root = make_mvtec(tmp_path / "in", train=12)
    for i, (data, _) in enumerate(bad_files().values()):
        (root / f"train/good/{i:03}.png").write_bytes(data)
    save_image(root / "ground_truth/scratch/999_mask.png", square_mask())
    result = pack(root, tmp_path / "out", size=32, skip_bad=True)
    files = [*(f"train/good/{i:03}.png" for i in range(6)), "ground_truth/scratch/999_mask.png"]
    assert [file for file, _ in result.skipped] == sorted(files)
    for (_, reason), file in zip(result.skipped, sorted(files), strict=True):
        assert str(tmp_path) not in reason
        assert file in reason or "mask" in reason
    assert result.images == 19 - 6
    assert len(Index.read(str(tmp_path / "out")).select(Split.TRAIN, val_fraction=0)) == 6
    assert pack(root, tmp_path / "out", size=32, skip_bad=True).unchanged
    with pytest.raises(DataError, match="mask without an image"):
        pack(root, tmp_path / "out", size=32)


def test_a_folder_of_nothing_but_bad_images_is_an_error_even_then(tmp_path):
    root = make_mvtec(tmp_path / "in", scratch=0)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="holds no usable image; 9 were skipped"):
        pack(root, tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_a_shard_whose_images_are_all_bad_is_left_out(tmp_path):
    root = make_mvtec(tmp_path / "in")
    (root / "train/good/003.png").write_bytes(b"")
    for name in "ab":
        path = save_image(tmp_path / f"in/{name}/train/good/0.png", texture(0))
    path.write_bytes(b"")
    result = pack(root.parent, tmp_path / "out", size=32, samples_per_shard=1, skip_bad=True)
    assert pack(
        root.parent, tmp_path / "out", size=32, samples_per_shard=1, skip_bad=True
    ).unchanged
    assert result.shards == len(list((tmp_path / "out").glob("*.tar"))) == 13


@pytest.mark.parametrize("image", ["train/good/x.png", "test/scratch/000.png"])
def test_a_pipe_named_as_an_image_is_refused_and_not_waited_for(tmp_path, image):
    root = make_mvtec(tmp_path / "in")
    (root / image).unlink(missing_ok=True)
    os.mkfifo(root / image)
    with pytest.raises(DataError, match=rf"{image} cannot be read: it is a folder, pipe or device"):
        pack(root, tmp_path / "out", size=32)
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_a_skipped_file_whose_name_is_not_utf8_is_remembered(tmp_path):
    root = make_mvtec(tmp_path / "in")
    name = os.fsdecode(b"train/good/\xff.png")
    (root / name).write_bytes(b"")
    first = pack(root, tmp_path / "out", size=32, skip_bad=True)
    assert [file for file, _ in first.skipped] == [name]
    (tmp_path / "out" / INDEX_FILE).read_text(encoding="utf-8")
    assert pack(root, tmp_path / "out", size=32, skip_bad=True).unchanged


def test_two_files_with_one_key_are_refused(tmp_path):
    root = make_mvtec(tmp_path / "in")
    Image.fromarray(texture(5)).save(root / "train/good/000.jpg")
    with pytest.raises(DataError, match=r"000\.png would have the same key, tile/train/good/000"):
        pack(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_category_without_defects_and_a_few_images_pack(tmp_path):
    save_image(tmp_path / "in/tile/train/good/0.png", texture(0))
    result = pack(tmp_path / "in/tile", tmp_path / "out")
    assert result.counts == {"train": {"tile": {"good": 1}}}


def test_classes_are_packed_with_their_names(tmp_path):
    for name in ("cat", "dog"):
        for split, count in (("train", 5), ("test", 2)):
            for i in range(count):
                save_image(tmp_path / f"in/{split}/{name}/{i}.png", texture(i))
    pack(tmp_path / "in", tmp_path / "out", size=16)
    index = Index.read(str(tmp_path / "out"))
    assert {s.gt_label for s in index.samples} == {None}
    assert {s.class_name for s in index.select(Split.TEST, normal_class="cat")} == {"cat", "dog"}
    assert len(index.select(Split.TRAIN, normal_class="cat", val_fraction=0)) == 5


def test_shards_are_many_enough_to_stream_and_mix_their_split(tmp_path):
    for name in ("cat", "dog"):
        for i in range(160):
            save_image(tmp_path / f"in/train/{name}/{i}.png", texture(i, 4, 4))
    pack(tmp_path / "in", tmp_path / "out", size=0)
    index = Index.read(str(tmp_path / "out"))
    assert [shard.samples for shard in index.shards] == [20] * 16
    for shard in index.shards:
        names = {s.class_name for s in index.samples if s.shard == shard.file}
        assert names == {"cat", "dog"}


def test_visa_and_refoldered_folders_pack_with_their_masks(tmp_path):
    rows = ["object,split,label,image,mask"]
    for name, label, mask in (("0", "normal", ""), ("1", "anomaly", "nut/m/1.png")):
        save_image(tmp_path / f"visa/nut/i/{name}.png", texture(int(name)))
        split = "test" if mask else "train"
        rows.append(f"nut,{split},{label},nut/i/{name}.png,{mask}")
    save_image(tmp_path / "visa/nut/m/1.png", square_mask() // 255)  # VisA numbers its regions
    (tmp_path / "visa/split.csv").write_text("\n".join(rows))
    save_image(tmp_path / "tile/train/good/0.png", texture(0))
    save_image(tmp_path / "tile/test/bad/crack_0.png", texture(1))
    save_image(tmp_path / "tile/ground_truth/crack/0_mask.png", square_mask())
    for name, defect in (("visa", "anomaly"), ("tile", "crack")):
        result = pack(tmp_path / name, tmp_path / "out" / name, size=20)
        sample = next(s for s in Index.read(result.out).samples if s.gt_label)
        assert sample.defect_type == defect
        assert sample.mask
        shard = (tmp_path / "out" / name / sample.shard).read_bytes()
        data = shard[sample.mask.offset :][: sample.mask.size]
        expected = resize_mask(square_mask() > 0, 20, 20)
        np.testing.assert_array_equal(decode_mask(data, ""), expected)


def test_categories_whose_names_shorten_alike_do_not_collide(tmp_path):
    for name in ("tile é", "tile è"):
        make_mvtec(tmp_path / "in", name)
    result = pack(tmp_path / "in", tmp_path / "out", size=16)
    files = [shard.file for shard in Index.read(str(tmp_path / "out")).shards]
    assert len(set(files)) == result.shards == 4
    assert all(file.isascii() and " " not in file for file in files)


def test_an_unreadable_image_is_named(open_folder, as_unprivileged):
    root = make_mvtec(open_folder / "in")
    (root / "train/good/001.png").chmod(0)
    with pytest.raises(DataError, match=r"good/001\.png cannot be read: Permission denied"):
        pack(root, open_folder / "out", size=32)
    result = pack(root, open_folder / "out", size=32, skip_bad=True)
    assert [file for file, _ in result.skipped] == ["train/good/001.png"]


def test_a_read_only_root_is_enough_and_a_read_only_out_is_named(open_folder, as_unprivileged):
    root = make_mvtec(open_folder / "in")
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    pack(root, open_folder / "out", size=32)
    (open_folder / "closed").mkdir(mode=0o555)
    for out in ("closed", "closed/inner"):
        with pytest.raises(DataError, match=r"closed.* cannot be read or written: Permission"):
            pack(root, open_folder / out, size=32)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)


def test_a_full_disk_is_one_clear_error_and_the_pack_goes_on_after_it(tmp_path):
    root = make_mvtec(tmp_path / "in")
    save_image(root / "train/good/005.png", texture(5, 400, 400))
    pack(root, tmp_path / "whole", size=0, samples_per_shard=1)
    # A limit on the size of files stands in for a full disk: it strikes the large image alone.
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from kdad_dist.data.writer import pack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), size=0, samples_per_shard=1)"
    )
    out = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", program, root, out], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "DataError" in process.stderr
    assert "File too large" in process.stderr
    assert "cannot be read or written" in process.stderr
    assert not (out / INDEX_FILE).exists()
    assert not list(out.rglob("*.tmp"))
    pack(root, out, size=0, samples_per_shard=1)
    assert content(out) == content(tmp_path / "whole")


def test_packing_imports_no_torch():
    program = (
        "import sys, kdad_dist.data.writer, kdad_dist.data.verify\n"
        "assert 'torch' not in sys.modules and 'webdataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("name", ["magnetic_tile", "hazelnut"])
def test_real_photographs_pack(shared_data, tmp_path, name):
    result = pack(shared_data / name, tmp_path / "out", size=64)
    index = Index.read(str(tmp_path / "out"))
    defective = [s for s in index.samples if s.gt_label]
    assert all(s.mask for s in defective)
    assert result.images == {"magnetic_tile": 1340, "hazelnut": 51}[name]
    assert (tmp_path / "out" / SAMPLES_FILE).exists()
