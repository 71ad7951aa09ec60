"""Runs that several modules only look at."""

from pathlib import Path

import pytest
import yaml

from tests.helpers import make_mvtec, save_image, texture
from tests.kdad import succeeds
from tests.tiny import FIND_ANOMALIES, tiny

EXPORTED = {"mkd": {"localise": "none"}}
"""Where graphs cannot say all that a method can."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and scored run of each method that finds anomalies, and five new images."""
    folder = tmp_path_factory.mktemp("runs")
    make_mvtec(folder / "images", train=10, good=3, scratch=4)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    for name in FIND_ANOMALIES:
        config = tiny(
            name,
            method=EXPORTED.get(name, {}),
            data={"shards": str(folder / "shards")},
            optim={"name": "adam", "lr": 1.0e-3},
            train={"steps": 2, "batch_size": 4},
            score={"smooth_sigma": 1},
        )
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        succeeds("train", folder / f"{name}.yaml", f"output={folder / name}")
        succeeds("score", folder / name)
    for i in range(5):
        save_image(folder / f"new/{i}.png", texture(500 + i, 30 + i, 60 - i))
    return folder
