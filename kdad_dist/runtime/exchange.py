"""How fast the processes of a launch exchange numbers: the sum that training makes, timed."""

import time
from typing import Any

import torch
import torch.distributed as dist

from kdad_dist.errors import KdadError
from kdad_dist.runtime import session
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.stopping import outlive_no_launcher
from kdad_dist.runtime.together import gathered, shared

MEBIBYTES = {"cpu": 16, "cuda": 256}
"""Of the sum that tells the bandwidth; on others as on the CPU."""
TIMES = 5
"""Sums of which the fastest counts."""
MINUTES = 1.0
"""For which the processes wait for each other."""


def measure() -> dict[str, Any]:
    """What a sum over all processes of this launch takes. Collective.

    Returns:
        `gigabytes_per_second` is the bandwidth of each process's connection, of which the sum of S
        bytes over n processes needs 2 (n - 1) / n S; null of one process, like `latency_ms`.

    Raises:
        UsageError: the launcher started something else than it was asked for.
        KdadError: the sum is wrong, or a process was lost.
    """
    outlive_no_launcher()
    with session.start(timeout_minutes=MINUTES, trains=True) as here:
        size = MEBIBYTES.get(here.device.type, MEBIBYTES["cpu"]) * 2**20
        latency, slow = shared(lambda: [seconds(here, 4), seconds(here, size)])
        moved = 2 * (here.world - 1) / here.world * size
        alone = here.world == 1
        return {
            "processes": here.world,
            "machines": here.world // here.local_world,
            "mode": here.mode,
            "device": here.device.type,
            "backend": dist.get_backend() if dist.is_initialized() else None,
            "latency_ms": None if alone else round(1000 * latency, 3),
            "gigabytes_per_second": None if alone else round(moved / slow / 1e9, 3),
            "bytes": size,
        }


def seconds(here: Session, size: int) -> float:
    """Of a sum of so many bytes on the slowest process: the best of a few.

    Raises:
        KdadError: on all processes, if it is wrong on one of them.
    """
    best, fits = float("inf"), True
    for _ in range(1 + TIMES):  # the first one makes the connections
        values = torch.full((size // 4,), here.rank + 1.0, device=here.device)
        here.barrier()
        start = time.perf_counter()
        here.sum(values)[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
        fits = fits and bool((values == here.world * (here.world + 1) / 2).all())
    found = gathered((best, fits))
    if not all(fits for _, fits in found):
        raise KdadError(
            f"the sum of {size} bytes over {here.world} processes is wrong",
            "look for faulty memory, GPUs or links (dmesg, nvidia-smi, NCCL_DEBUG=INFO)",
        )
    return max(best for best, _ in found)
