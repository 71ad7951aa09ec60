"""What tests of sweeps share: classes with a configuration, and runs that look finished."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kdad_dist.config.load import dump
from kdad_dist.data.writer import pack
from kdad_dist.sweep.jobs import Job
from kdad_dist.sweep.published import METRICS
from tests.helpers import make_mvtec

ODD = "wo od, |'q\" $(touch x)"
"""A class whose name is a list, a table cell and a shell command at once."""


def many(place: Path, classes: Sequence[str], **sections: Any) -> Path:
    """A configuration, `many.yaml`, for a tiny network and as tiny images of these classes.

    Args:
        sections: of the configuration, beside or instead of the usual ones.
    """
    for category in classes:
        make_mvtec(place / "images", category, train=8, good=2, scratch=2)
    pack(place / "images", place / "shards", size=32)
    values = {
        "name": "many",
        "output": str(place / "many"),
        "data": {"shards": str(place / "shards"), "image_size": 32},
        "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1]}},
        "optim": {"name": "adam", "lr": 1.0e-3},
        **sections,
    }
    path = place / "many.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def finish(job: Job, final: dict[str, float] | None = None, **figures: float | None) -> None:
    """Leaves a run as training and scoring do.

    Args:
        final: figures of the last checkpoint, where they differ from those of the selected one.
    """
    job.run.mkdir(parents=True)
    (job.run / "config.yaml").write_text(dump(job.config))
    os.utime(job.run / "config.yaml", (1e9, 1e9))  # scoring comes later
    (job.run / "status.json").write_text('{"state": "finished"}')
    for name, rule, values in (
        ("metrics.json", "lowest loss on held-out images", figures),
        ("metrics-last.json", "last", figures if final is None else final),
    ):
        mean = dict.fromkeys(METRICS, None) | values
        told = {"checkpoint_rule": rule, "checkpoint_step": 4}
        (job.run / name).write_text(json.dumps({"mean": mean, "provenance": told}))
