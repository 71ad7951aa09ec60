"""Synthetic defects: seeded, visible where the mask says so, and nowhere else."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kdad_dist.data.image import decode_image, resize_image
from kdad_dist.data.synthetic import KINDS, Draw, synthetic_defect
from tests.needs import REPOSITORY


def surface(seed: int, height: int = 96, width: int = 96, grey: bool = False) -> NDArray[np.uint8]:
    """A grainy surface with a slow change of brightness."""
    random = np.random.default_rng(seed)
    slope = np.linspace(90, 150, width)[None, :, None] + np.zeros((height, 1, 3))
    grain = random.normal(0, 4, (height, width, 1 if grey else 3))
    return np.clip(slope + grain, 0, 255).astype(np.uint8)


def digest(image: NDArray, mask: NDArray) -> str:
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


def test_the_same_key_and_seed_give_the_same_defect_in_another_process():
    code = (
        "from tests.unit.test_synthetic import *\n"
        "print(*[digest(*synthetic_defect(surface(1), str(k), 3)) for k in range(20)])"
    )
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    here = [digest(*synthetic_defect(surface(1), str(k), 3)) for k in range(20)]
    assert there.stdout.split() == here
    assert len(set(here)) == 20
    assert digest(*synthetic_defect(surface(1), "0", 4)) not in here


def test_the_random_numbers_never_change():
    """Figures chosen by these defects must be comparable after an upgrade."""
    draw = Draw("0/tile/train/000")
    assert [draw.below(1000) for _ in range(5)] == [515, 5, 409, 903, 62]
    assert draw.between(2, 4) == pytest.approx(3.7738885671091476, abs=1e-15)


@pytest.mark.parametrize("shape", [(96, 96), (64, 130), (130, 64), (17, 33), (256, 256)])
def test_pixels_change_where_the_mask_says_so_and_hardly_elsewhere(shape: tuple[int, int]):
    for key in range(12):
        image = surface(key, *shape)
        before = image.copy()
        result, mask = synthetic_defect(image, str(key), 0)
        assert np.array_equal(image, before)
        assert result.dtype == np.uint8 and result.shape == image.shape
        assert mask.dtype == np.bool_ and mask.shape == shape and mask.any() and not mask.all()
        change = np.abs(result.astype(int) - image).max(axis=2)
        assert change[mask].mean() > 4
        assert change[~mask].mean() < 1.5
        assert (change[~mask] == 0).mean() > 0.5


def test_defects_are_of_every_kind_and_from_plain_to_subtle():
    image = surface(0, 128, 128)
    contrast, area = [], []
    for key in range(80):
        result, mask = synthetic_defect(image, str(key), 0)
        contrast.append(np.abs(result.astype(int) - image).max(axis=2)[mask].mean())
        area.append(mask.mean())
    assert min(contrast) < 12 and max(contrast) > 50
    assert min(area) < 0.002 and max(area) > 0.05 and np.median(area) < 0.1
    for kind in KINDS:
        assert not np.array_equal(kind(image.astype(np.float32), Draw("a")), image)


def test_a_grey_image_stays_grey():
    for key in range(20):
        result, _ = synthetic_defect(surface(key, grey=True), str(key), 0)
        assert (result == result[..., :1]).all()


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_images_of_one_colour_get_a_defect_too(level: int):
    image = np.full((48, 64, 3), level, dtype=np.uint8)
    for key in range(20):
        result, mask = synthetic_defect(image, str(key), 0)
        assert mask.any() and (result[mask] != image[mask]).any()


def test_real_surfaces_get_defects_of_a_few_percent(shared_data: Path):
    folder = shared_data / "magnetic_tile" / "train" / "good"
    area = []
    for path in sorted(folder.iterdir())[:60:3]:
        image = resize_image(decode_image(path.read_bytes(), path.name), 256)
        result, mask = synthetic_defect(image, path.stem, 0)
        assert not np.array_equal(result, image)
        area.append(mask.mean())
    assert 0.0002 < np.median(area) < 0.06 and max(area) < 0.5
