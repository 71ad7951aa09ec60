"""Threads that decode images, and threads that read ahead of use."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from kdad_dist.types import Poll, go_on

T = TypeVar("T")
QUEUED = 1024
"""Images handed to the decoding threads at a time, so that memory stays bounded."""


def cpu_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Decoder(Generic[T]):
    """Decodes images in as many threads as there are cores (Pillow lets go of the GIL)."""

    def __init__(self, image: Callable[[T], NDArray[np.uint8]], size: int) -> None:
        """Args:
        image: gives the (size, size, 3) image of an item; called by several threads at once.
        """
        self._image = image
        self._size = size
        self._threads = ThreadPoolExecutor(cpu_count(), thread_name_prefix="kdad-decode")

    def into(self, images: NDArray[np.uint8], items: Sequence[T], poll: Poll = go_on) -> None:
        """Writes the images of `items` into `images`, in their order."""
        for start in range(0, len(items), QUEUED):
            self._some(images[start : start + QUEUED], items[start : start + QUEUED], poll)

    def _some(self, images: NDArray[np.uint8], items: Sequence[T], poll: Poll) -> None:
        def decode(place: int, item: T) -> None:
            images[place] = self._image(item)

        work = [self._threads.submit(decode, place, item) for place, item in enumerate(items)]
        try:
            for done in work:
                done.result()
                poll(done=1)
        finally:  # after an error nobody may write into `images` any more
            for left in work:
                left.cancel()
            wait(work)

    def close(self) -> None:
        """Ends the threads; nothing is decoded any more."""
        self._threads.shutdown()

    def read(self, items: Sequence[T], pin: bool) -> UInt8[Tensor, "b 3 s s"]:
        """The images of `items`, in page-locked memory where `pin`."""
        shape = (len(items), self._size, self._size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        self.into(images.numpy(), items)
        return images.permute(0, 3, 1, 2)


def in_advance(
    work: Iterable[Callable[[], T]], depth: int, threads: int, device: torch.device | None = None
) -> Generator[T, None, None]:
    """The results of the calls, in order, made by background threads up to `depth` in advance.

    An error in a call is raised where its result is due. When the consumer stops, early or not,
    calls that have not begun are dropped and the threads end.
    """

    def prepare() -> None:
        # The current CUDA device belongs to a thread; page-locked memory is made for it.
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)

    workers = ThreadPoolExecutor(threads, thread_name_prefix="kdad-read", initializer=prepare)
    pending: deque[Future[T]] = deque()
    try:
        for call in work:
            pending.append(workers.submit(call))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        workers.shutdown(cancel_futures=True)
