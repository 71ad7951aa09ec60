"""Where scores come from and how fast they came, for the files beside them."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdad_dist.config.changes import digest
from kdad_dist.config.run import RunConfig
from kdad_dist.methods.readout import readout_of
from kdad_dist.runtime import environment
from kdad_dist.runtime.restore import Trained


class Timing(NamedTuple):
    """Of one unit of work, on the process that computed it."""

    images: int
    seconds: float
    """From decoded pixels to map and score."""


def provenance(
    config: RunConfig, trained: Trained, timings: Sequence[Timing], seconds: float, world: int
) -> dict[str, Any]:
    """Everything that scores depend on but their data, and their speed.

    Args:
        timings: of all units of all processes.
        seconds: from the first of them to the last, reading and writing included.
    """
    images = sum(timing.images for timing in timings)
    return {
        "checkpoint_step": trained.step,
        "checkpoint_rule": trained.rule,
        "config_digest": digest(config),
        "readout": readout_of(config),
        "commit": environment.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "images": images,
        "images_per_second": round(images / seconds, 2),
        "latency_ms": latency(timings),
        "world_size": world,
    }


def latency(timings: Sequence[Timing]) -> dict[str, float]:
    """Milliseconds that a unit takes, of those with most images."""
    largest = max(timing.images for timing in timings)
    times = [1000 * timing.seconds for timing in timings if timing.images == largest]
    median, p95 = np.quantile(times, [0.5, 0.95]).tolist()
    return {"median": round(median, 3), "p95": round(p95, 3), "unit_images": largest}
