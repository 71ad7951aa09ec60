"""What a launch of several processes trains on: augmented images, the same as one process sees."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import make_mvtec
from tests.kdad import kdad, succeeds

pytestmark = pytest.mark.launch

EPOCH = 3
CONFIG = {
    "name": "augmented",
    "data": {
        "image_size": 24,
        "val_fraction": 0,
        "augment": {"crop_margin": 8, "brightness": 0.2, "saturation": 0.2, "flip": True},
    },
    "method": {
        "name": "stfpm",
        "teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]},
    },
    "optim": {"name": "sgd", "lr": 0.03},
    "train": {"epochs": 2, "batch_size": 5},
}


def note_pixels(folder: Path) -> None:
    """Has a rank write down which pixels it trains on: a line for each image, step by step."""
    from kdad_dist.train import loop

    take_step = loop.take_step
    steps = 0

    def noted(run: Any, micros: list, lr: float) -> Any:
        nonlocal steps
        with (folder / f"rank_{run.session.rank}").open("a") as file:
            for micro in micros:
                for row, image in zip(micro.batch.row, micro.batch.image, strict=True):
                    pixels = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                    file.write(f"{steps} {int(row)} {pixels}\n")
        steps += 1
        return take_step(run, micros, lr)

    loop.take_step = noted


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two epochs over 14 images in several shards, the last batch a short one."""
    folder = tmp_path_factory.mktemp("augmented")
    make_mvtec(folder / "images", train=14, good=1, scratch=1)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    path = folder / "augmented.yaml"
    data = {**CONFIG["data"], "shards": str(folder / "shards")}
    path.write_text(yaml.safe_dump({**CONFIG, "data": data}))
    return path


def seen(config: Path, processes: int, *words: str) -> list[tuple[int, int, str]]:
    """Step, row and hash of the pixels of every image that the processes trained on."""
    folder = config.parent / "-".join(["seen", str(processes), *words])
    folder.mkdir()
    command = ["train", config, f"output={folder / 'run'}", *words]
    outcome = kdad(*command, processes=processes, first=partial(note_pixels, folder))
    assert outcome.codes == [0] * processes, outcome.text
    files = sorted(folder.glob("rank_*"))
    assert len(files) == processes
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    return sorted((int(step), int(row), pixels) for step, row, pixels in lines)


def test_two_processes_train_on_the_pixels_of_one_step_by_step(config: Path):
    one = seen(config, 1)
    assert len(one) == len({pixels for *_, pixels in one}) == 28  # all images, changed every epoch
    assert seen(config, 2) == one
    assert seen(config, 2, "train.micro_batch_size=1", "data.cache=none") == one


def test_streaming_processes_see_the_same_pixels_of_each_image_in_each_epoch(config: Path):
    one, two, indexed = (
        {(step // EPOCH, row, pixels) for step, row, pixels in found}
        for found in (
            seen(config, 1, "data.access=stream"),
            seen(config, 2, "data.access=stream"),
            seen(config, 1, "data.cache=device"),
        )
    )
    assert one == two == indexed and len(one) == 28


def test_a_launch_with_a_margin_beyond_the_packed_size_is_refused(config: Path):
    words = [f"output={config.parent / 'refused'}", "data.augment.crop_margin=9"]
    outcome = kdad("train", config, *words, processes=2)
    assert outcome.codes == [2, 2] and "data.augment.crop_margin=9" in outcome.text
