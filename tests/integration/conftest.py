"""Runs that several modules only look at."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import make_mvtec, save_image, texture
from tests.kdad import succeeds

METHODS: dict[str, dict[str, Any]] = {
    "stfpm": {
        "name": "stfpm",
        "teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]},
    },
    "loramae": {
        "name": "loramae",
        "preset": "mae_vit_tiny_patch8",
        "weights": "random",
        "freeze_random": True,
    },
    "mkd": {
        "name": "mkd",
        "teacher": {"backbone": "test_resnet", "weights": "random", "layers": [1, 2, 3]},
        "pool": False,
        "localise": "none",
    },
    "vitkd": {
        "name": "vitkd",
        "teacher": {"backbone": "test_vit", "weights": "random", "layers": [1, 2]},
        "student": {"heads": 4, "mlp": 32},
    },
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and scored run of each method, and five new images of several sizes."""
    folder = tmp_path_factory.mktemp("runs")
    make_mvtec(folder / "images", train=10, good=3, scratch=4)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    for name, method in METHODS.items():
        config = {
            "name": name,
            "data": {"shards": str(folder / "shards"), "image_size": 32},
            "method": method,
            "optim": {"name": "adam", "lr": 1.0e-3},
            "train": {"steps": 2, "batch_size": 4},
            "score": {"smooth_sigma": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        succeeds("train", folder / f"{name}.yaml", f"output={folder / name}")
        succeeds("score", folder / name)
    for i in range(5):
        save_image(folder / f"new/{i}.png", texture(500 + i, 30 + i, 60 - i))
    return folder
