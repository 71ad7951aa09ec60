"""Work that all processes do together, so that the failure of one is the error of all.

Without that, a process that fails alone (its disk is full, say) leaves the others waiting for it.
Works in a single process too, without `torch.distributed`. Work in the background has a `group` of
its own, so that its talk does not mix with that of the training.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from kdad_dist.errors import CheckpointError, KdadError
from kdad_dist.models.gather import processes, rank_here

T = TypeVar("T")


Group = dist.ProcessGroup | None
"""None: the default one, of all processes."""


def on_main(done: str, path: Path, work: Callable[[], T], group: Group = None) -> T:
    """What `work` returns in the main process, for all of them; its failure is everybody's."""
    return cast(T, together(done, path, lambda: work() if rank_here() == 0 else None, group)[0])


def together(done: str, path: Path, work: Callable[[], T], group: Group = None) -> list[T]:
    """As `shared`, for work on checkpoints: every failure becomes a CheckpointError."""

    def described() -> T:
        try:
            return work()
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            raise CheckpointError(*_describe(error, done, path)) from error

    return gathered(shared(described, group), group)


def shared(work: Callable[[], T], group: Group = None) -> T:
    """What `work` returned in this process; a KdadError of one process is the error of all.

    `work` must not talk to other processes itself, unless it fails on all of them or none.
    """
    result, failure = None, None
    try:
        result = work()
    except KdadError as error:
        failure = error
    said = (type(failure), failure.problem, failure.remedy) if failure else None
    for failed in gathered(said, group):
        if failed:
            kind, problem, remedy = failed
            error = kind(problem, remedy)
            error.of_all = True
            raise error from failure
    return cast(T, result)


def gathered(value: T, group: Group = None) -> list[T]:
    """The values of all processes, by rank, on each of them."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value, group)
    return values


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process ended or does not answer."""
    # gloo raises plain RuntimeErrors that name its source files.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


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
