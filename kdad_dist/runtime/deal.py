"""Work cut once and dealt whole: the reason why scores do not depend on the number of processes.

Float32 results of a network change in their last bits with the batch that an image stands in and
with the number of threads that compute it. So the units of work are cut from the number of images
alone, each is computed by one thread, and only who computes which unit depends on the processes.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from kdad_dist.runtime.session import Session, free_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
SHARES = 16
"""Units that even a small set is cut into, so that up to so many processes have work."""


def cut(items: Sequence[Item], largest: int) -> list[Sequence[Item]]:
    """Units of equal size (the last may be shorter), at most `largest` items each."""
    size = max(1, min(largest, len(items) // SHARES))
    return [items[start : start + size] for start in range(0, len(items), size)]


def work(
    units: Sequence[Item],
    compute: Callable[[Item], Result],
    session: Session,
    left: Sequence[int] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """The results of this process's units with their numbers, in order, without any collective.

    On a CPU several units are computed side by side, one thread each.

    Args:
        left: the numbers of the units that are wanted, the same on all processes; None: of all.
    """
    mine = (range(len(units)) if left is None else left)[session.rank :: session.world]
    threads = free_cores(session) if session.device.type == "cpu" else 2
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # Bounded: a unit that is handed out holds its images and maps.
            pending = []
            for number in mine:
                pending.append((number, pool.submit(compute, units[number])))
                if len(pending) > threads:
                    first, future = pending.pop(0)
                    yield first, future.result()
            for number, future in pending:
                yield number, future.result()
    finally:
        torch.set_num_threads(before)
