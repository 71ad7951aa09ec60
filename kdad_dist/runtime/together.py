"""Work that all processes do together, so that the failure of one is the error of all.

Without that, a process that fails alone (its disk is full, say) leaves the others waiting for it.
Works in a single process too, without `torch.distributed`.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from kdad_dist.errors import CheckpointError

T = TypeVar("T")


def rank_here() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_main(done: str, path: Path, work: Callable[[], T]) -> T:
    """What `work` returns in the main process, for all of them; its failure is everybody's."""
    return cast(T, together(done, path, lambda: work() if rank_here() == 0 else None)[0])


def together(done: str, path: Path, work: Callable[[], T]) -> list[T]:
    """What `work` returned in each process, by rank; the failure of one is the error of all."""
    result, failure, cause = None, None, None
    try:
        result = work()
    except CheckpointError as error:
        failure, cause = (error.problem, error.remedy), error
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - raised again below
        failure, cause = _describe(error, done, path), error
    outcomes: list[Any] = [(result, failure)]
    if processes() > 1:
        outcomes = [None] * processes()
        dist.all_gather_object(outcomes, (result, failure))
    for _, failed in outcomes:
        if failed:
            raise CheckpointError(*failed) from cause
    return [outcome for outcome, _ in outcomes]


def _describe(error: BaseException, done: str, path: Path) -> tuple[str, str]:
    """Problem and remedy of an unforeseen failure, with the rank it happened on."""
    rank = rank_here()
    if isinstance(error, CheckpointException):  # DCP has gathered the failures of all ranks
        rank, (error, _) = min(error.failures.items())
    code = error.errno if isinstance(error, OSError) else None
    remedies = {
        errno.ENOSPC: "free some space, or set `output` to a disk with more",
        errno.EDQUOT: "free some of your quota, or set `output` to another disk",
        errno.EACCES: "allow this user to write there, or set `output` to another directory",
        errno.EROFS: "set `output` to a directory that can be written to",
    }
    return (
        f"checkpoint {path} cannot be {done}: rank {rank}: {type(error).__name__}: {error}",
        remedies.get(code or 0, "look at the file system and the error above, then start again"),
    )
