"""Fixtures that several modules share."""

from pathlib import Path

import pytest

from tests.sweeps import ODD, many


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory) -> Path:
    """A configuration for two classes."""
    return many(tmp_path_factory.mktemp("sweep"), (ODD, "zip"), train={"steps": 2}, seed=5)


@pytest.fixture
def config(two_classes, tmp_path) -> Path:
    """The same, for a sweep in a directory of its own."""
    path = tmp_path / "many.yaml"
    text = two_classes.read_text()
    path.write_text(text.replace(str(two_classes.parent / "many"), str(tmp_path / "many")))
    return path
