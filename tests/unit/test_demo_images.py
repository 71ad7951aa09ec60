"""The generated cloth: the same for the same seed, subtle, and marked where they are broken."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from kdad_dist.data.layouts import scan
from kdad_dist.demo.commands import TRAIN, claim, table, write_photos, z_score
from kdad_dist.demo.images import CATEGORY, DEFECTS, SIDE, Example, draw, examples
from kdad_dist.errors import UsageError


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    for kind in ("good", *DEFECTS):
        first, again, other = (draw(seed, "test", kind, 3) for seed in (5, 5, 6))
        assert first.image.tobytes() == again.image.tobytes()
        assert first.image.tobytes() != other.image.tobytes()


def test_training_and_test_images_of_one_seed_differ() -> None:
    train, test = (draw(0, split, "good", 0).image for split in ("train", "test"))
    assert (train != test).mean() > 0.5


def test_every_kind_of_defect_has_a_mask_on_a_small_part_of_the_image() -> None:
    assert len(DEFECTS) >= 4
    for kind in DEFECTS:
        for number in range(4):
            example = draw(1, "test", kind, number)
            assert example.image.shape == (SIDE, SIDE, 3) and example.image.dtype == np.uint8
            assert example.mask is not None and 20 <= example.mask.sum() < 0.1 * SIDE**2


def test_sound_cloth_has_no_mask() -> None:
    assert draw(1, "test", "good", 0).mask is None


def test_a_defect_changes_its_mask_and_next_to_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind, defect in DEFECTS.items():
        broken = draw(2, "test", kind, 0)
        # The same cloth, light and noise: the defect is drawn on a scene that nobody looks at.
        monkeypatch.setitem(
            DEFECTS, kind, lambda scene, rng, defect=defect: defect(_copy(scene), rng)
        )
        sound = draw(2, "test", kind, 0)
        change = np.abs(broken.image.astype(int) - sound.image).mean(-1)
        assert broken.mask is not None
        outside = np.ones_like(broken.mask)
        rows, columns = np.nonzero(broken.mask)
        outside[
            max(rows.min() - 8, 0) : rows.max() + 9, max(columns.min() - 8, 0) : columns.max() + 9
        ] = False
        assert change[broken.mask].mean() > 3, kind
        assert change[outside].mean() < 0.1, kind


def _copy(scene: object) -> object:
    import copy

    return copy.deepcopy(scene)


def test_pixels_of_a_defect_have_values_that_sound_pixels_have_too() -> None:
    sound = np.stack([draw(3, "train", "good", i).image for i in range(12)])
    low, high = np.percentile(sound, [0.1, 99.9])
    for kind in DEFECTS:
        example = draw(3, "test", kind, 0)
        values = example.image[example.mask]
        assert ((values >= low) & (values <= high)).mean() > 0.9, kind


@pytest.mark.parametrize("seed", [1001, 1002])
def test_the_z_score_of_pixels_hardly_finds_the_defects(seed: int) -> None:
    metrics = z_score(list(examples(seed, train=40, good=12, defective=4)), sigma=2)
    assert metrics["mean"]["image_auroc"] < 0.75
    assert metrics["mean"]["pixel_auroc"] < 0.75


def test_the_photographs_are_an_ordinary_image_folder(tmp_path: Path) -> None:
    data = list(examples(0, train=3, good=2, defective=1))
    write_photos(tmp_path / "photos", data)
    found = scan(tmp_path / "photos")
    assert len(found.records) == len(data)
    assert {r.defect_type for r in found.records if r.gt_label} == set(DEFECTS)
    assert all(r.mask for r in found.records if r.gt_label)


def test_photographs_that_are_there_are_left_alone_and_half_a_set_is_drawn_again(
    tmp_path: Path,
) -> None:
    data = list(examples(0, train=1, good=1, defective=0))
    partial = tmp_path / "photos.partial" / CATEGORY / "train" / "good"
    partial.mkdir(parents=True)
    (partial / "000.png").write_bytes(b"cut off")
    write_photos(tmp_path / "photos", data)
    first = tmp_path / "photos" / CATEGORY / "train" / "good" / "000.png"
    drawn = first.read_bytes()
    assert drawn != b"cut off"
    time = first.stat().st_mtime_ns
    write_photos(tmp_path / "photos", data)
    assert first.stat().st_mtime_ns == time and not partial.exists()


def test_a_directory_of_another_seed_is_refused_with_a_command_to_paste(tmp_path: Path) -> None:
    claim(tmp_path / "my demo", 0)
    claim(tmp_path / "my demo", 0)
    with pytest.raises(UsageError, match="seed 0") as caught:
        claim(tmp_path / "my demo", 1)
    command = shlex.split(caught.value.remedy.partition(": ")[2])
    assert command == ["kdad", "demo", "--seed", "1", "--out", str(tmp_path / "my demo-1")]


def test_a_directory_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not made by kdad demo"):
        claim(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "demo"
    file.write_text("")
    with pytest.raises(UsageError, match="not made by kdad demo"):
        claim(file, 0)


def test_the_table_shows_the_baseline_beside_every_figure() -> None:
    def constant(value: float) -> dict:
        entry = dict.fromkeys(("image_auroc", "pixel_auroc", "pixel_aupro"), value)
        return {"categories": {CATEGORY: {**entry, "defect_types": dict.fromkeys(DEFECTS, entry)}}}

    lines = table(constant(0.987), constant(0.512)).splitlines()
    assert len(lines) == 2 + 1 + len(DEFECTS)
    assert all(line.count("0.987") == 3 and line.count("0.512") == 2 for line in lines[2:])


def test_the_set_has_its_stated_size() -> None:
    counted = list(examples(0, train=2, good=1, defective=1))
    assert [e.split for e in counted] == ["train"] * 2 + ["test"] * (1 + len(DEFECTS))
    assert TRAIN >= 50 and all(isinstance(e, Example) for e in counted)
