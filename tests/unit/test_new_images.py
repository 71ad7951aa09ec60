"""Which new images a folder holds, and a table of them that is whole or none."""

from pathlib import Path

import pytest

from kdad_dist.data.new_images import find_images
from kdad_dist.data.records import images
from kdad_dist.errors import DataError
from kdad_dist.predict import in_order


def made(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_of_a_folder_the_images_are_those_that_pack_would_take(tmp_path: Path):
    # HEIC is refused by name, rather than left out, when it is decoded.
    wanted = made(tmp_path, "a.png", "b.jfif", "c.heic", "d/E.JPE")
    made(tmp_path, "._a.png", ".cache/f.png", "notes.txt", "g")
    assert find_images([str(tmp_path)], tmp_path / "out") == wanted == [*images(tmp_path)]
    assert find_images([str(tmp_path / "g")], tmp_path / "out") == [tmp_path / "g"]


@pytest.mark.parametrize("word", ["", "*", "**/*.*"])
def test_results_of_an_earlier_command_are_no_new_images(tmp_path: Path, word: str, caplog):
    wanted = made(tmp_path, "a.png", "judged-2/b.png", "z.png")
    made(tmp_path, "judged/overlays/a.jpg", "judged/maps/a.png", "judged.partial/maps/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "judged/maps")
    named = [str(tmp_path / word), str(tmp_path / "judged-2"), str(tmp_path / "link")]
    caplog.set_level("INFO")
    assert find_images(named, tmp_path / "judged") == wanted
    assert f"in {tmp_path / 'judged'}, where the results go" in caplog.text
    with pytest.raises(DataError, match=r"(?s)no image but 1 in .*give another folder"):
        find_images([str(tmp_path / "link")], tmp_path / "judged")


@pytest.mark.parametrize("files", ["ab", "abcc", "abd", "cab"])
def test_scores_that_are_not_one_for_each_image_make_no_table(files: str):
    parts = [{"rows": [{"order": [i, 0], "file": file}]} for i, file in enumerate(files)]
    with pytest.raises(DataError, match="not one for each of 3 images"):
        in_order(parts, [Path("a"), Path("b"), Path("c")])


def test_scores_come_in_the_order_of_the_images():
    parts = [
        {"rows": [{"order": [0, 0], "file": "a"}, {"order": [2, 0], "file": "c"}]},
        {"rows": [{"order": [1, 0], "file": "b"}]},
    ]
    rows = in_order(parts, [Path("a"), Path("b"), Path("c")])
    assert [row["file"] for row in rows] == ["a", "b", "c"]
