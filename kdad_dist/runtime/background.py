"""Work that all processes of a launch do together while they go on training."""

from collections.abc import Callable
from threading import Thread
from typing import cast

import torch.distributed as dist

from kdad_dist.models.gather import processes
from kdad_dist.runtime.together import Group


class Background:
    """One piece of work at a time, in a thread of each process.

    The threads talk to each other in a group of their own (gloo, whatever the training uses), so
    that nothing they say mixes with what the training says. Collective to make: later, the launcher
    that helps processes to find each other may be gone.
    """

    def __init__(self) -> None:
        several = processes() > 1
        self._group: Group = cast(Group, dist.new_group(backend="gloo")) if several else None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[Group], None]) -> None:
        """Begins; collective. What was begun before has been waited for."""
        assert self._thread is None, "wait for the work before"

        def run() -> None:
            try:
                work(self._group)
            except BaseException as error:  # noqa: BLE001
                self._error = error

        self._thread = Thread(target=run, name="background", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the work is done, and raises what it raised."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
