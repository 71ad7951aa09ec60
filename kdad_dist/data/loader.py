"""Batches in the order of a plan: decoded once, read ahead of use, converted on the device."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kdad_dist.data.cache import cache_root, filled_array
from kdad_dist.data.index import Index, Sample
from kdad_dist.data.plan import MicroBatch, Plan, Rows
from kdad_dist.data.reader import FIT_VERSION, ShardReader
from kdad_dist.errors import ConfigError
from kdad_dist.types import Batch, Features

T = TypeVar("T")
AHEAD = 2
"""Steps that are read before they are asked for, by a thread each."""

QUEUED = 1024
"""Images handed to the decoding threads at a time, so that memory stays bounded."""


class Micro(NamedTuple):
    """What one process contributes to one forward pass of all processes."""

    batch: Batch
    step_images: int
    """Images of the whole step over all processes."""


class Pixels(ABC):
    """Decoded images by their position in the list of samples."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, rows: Rows) -> UInt8[Tensor, "b 3 s s"]:
        """Images in channels_last memory, on the host or already on the device."""

    def floats(self, rows: Rows, device: torch.device) -> Float[Tensor, "b 3 s s"]:
        """Images in [0, 1] on the device, in channels_last memory."""
        return to_float(self.read(rows), device)


class Targets(Protocol):
    """Cached output of a teacher by position in the list of samples."""

    def read(self, rows: Rows) -> Features: ...


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

    def into(self, images: NDArray[np.uint8], items: Sequence[T]) -> None:
        """Writes the images of `items` into `images`, in their order."""
        for start in range(0, len(items), QUEUED):
            self._some(images[start : start + QUEUED], items[start : start + QUEUED])

    def _some(self, images: NDArray[np.uint8], items: Sequence[T]) -> None:
        def decode(place: int, item: T) -> None:
            images[place] = self._image(item)

        work = [self._threads.submit(decode, place, item) for place, item in enumerate(items)]
        try:
            for done in work:
                done.result()
        finally:  # after an error nobody may write into `images` any more
            for left in work:
                left.cancel()
            wait(work)

    def read(self, items: Sequence[T], pin: bool) -> UInt8[Tensor, "b 3 s s"]:
        """The images of `items`, in page-locked memory where `pin`."""
        shape = (len(items), self._size, self._size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        self.into(images.numpy(), items)
        return images.permute(0, 3, 1, 2)


class DecodedPixels(Pixels):
    """Decodes every image whenever it is read."""

    def __init__(self, samples: Sequence[Sample], decoder: Decoder[Sample], pin: bool) -> None:
        self._samples = samples
        self._decoder = decoder
        self._pin = pin

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, rows: Rows) -> UInt8[Tensor, "b 3 s s"]:
        return self._decoder.read([self._samples[row] for row in rows], self._pin)


class CachedPixels(Pixels):
    """Pixels in a memory-mapped file that all processes of a node share."""

    def __init__(self, images: NDArray[np.uint8], pin: bool) -> None:
        self._images = images
        self._pin = pin

    def __len__(self) -> int:
        return len(self._images)

    def read(self, rows: Rows) -> UInt8[Tensor, "b 3 s s"]:
        return take(self._images, rows, self._pin).permute(0, 3, 1, 2)

    def floats(self, rows: Rows, device: torch.device) -> Float[Tensor, "b 3 s s"]:
        if device.type == "cpu":
            return scaled(self._images, rows.tolist())
        return super().floats(rows, device)


class DevicePixels(Pixels):
    """Pixels that live on the device, all of them."""

    def __init__(self, images: NDArray[np.uint8], device: torch.device) -> None:
        try:
            self._images = torch.tensor(images, device=device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"data.cache=device needs {images.nbytes / 2**20:.1f} MiB, more than {device} has",
                "set data.cache=ram",
            ) from None

    def __len__(self) -> int:
        return len(self._images)

    def read(self, rows: Rows) -> UInt8[Tensor, "b 3 s s"]:
        chosen = torch.from_numpy(rows).to(self._images.device)
        return self._images.index_select(0, chosen).permute(0, 3, 1, 2)


def take(array: NDArray, rows: Rows, pin: bool) -> Tensor:
    """Rows of an array as a tensor of their own, in page-locked memory where `pin`."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    taken = torch.empty((len(rows), *array.shape[1:]), dtype=dtype, pin_memory=pin)
    # mode="clip" writes straight into `out`; the plan's rows are in range.
    np.take(array, rows, axis=0, out=taken.numpy(), mode="clip")
    return taken


def open_pixels(
    samples: Sequence[Sample], index: Index, image_size: int, cache: str, device: torch.device
) -> Pixels:
    """The samples' pixels, decoded once ("ram", "device") or whenever they are read ("none").

    With "ram" and "device" they are decoded by one process per node into a file below
    `cache_root()`, and found there by later runs; "device" then copies them to each device.

    Raises:
        DataError: a sample is damaged, or the cache has no room.
        ConfigError: `image_size` exceeds the packed size, or the device has no room.
    """
    decoder = Decoder(ShardReader(index.root, image_size).image, image_size)
    pin = device.type == "cuda"
    if cache == "none":
        return DecodedPixels(samples, decoder, pin)
    images = filled_array(
        cache_root() / "pixels" / pixel_key(samples, index, image_size),
        (len(samples), image_size, image_size, 3),
        np.uint8,
        lambda array: decoder.into(array, samples),
        f"the pixels of {len(samples)} images of {index.root}",
    )
    return DevicePixels(images, device) if cache == "device" else CachedPixels(images, pin)


def pixel_key(samples: Sequence[Sample], index: Index, image_size: int) -> str:
    """Name of a pixel cache: a hash of all that decides what it holds."""
    parts = [index.fingerprint, str(image_size), str(FIT_VERSION), *(s.key for s in samples)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def to_float(image: UInt8[Tensor, "b 3 s s"], device: torch.device) -> Float[Tensor, "b 3 s s"]:
    """Images in [0, 1] on the device, channels_last; bytes travel, a quarter of the numbers."""
    if device.type == "cpu":
        return scaled(image.permute(0, 2, 3, 1).numpy(), range(len(image)))
    image = image.to(device, non_blocking=True)
    return image.to(torch.float32, memory_format=torch.channels_last).div_(255)


def scaled(images: NDArray[np.uint8], rows: Sequence[int]) -> Float[Tensor, "b 3 s s"]:
    """Some of the images as numbers in [0, 1], on the CPU.

    By one thread of numpy, since torch's would wait for each other whenever cores are busy, and
    image by image, while each is in the core's cache.
    """
    numbers = np.empty((len(rows), *images.shape[1:]), dtype=np.float32)
    for place, row in enumerate(rows):
        numbers[place] = images[row]
        numbers[place] /= 255
    return torch.from_numpy(numbers).permute(0, 3, 1, 2)


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


class IndexedLoader:
    """The batches of one process, by a plan, from pixels at random access."""

    def __init__(
        self,
        pixels: Pixels,
        plan: Plan,
        device: torch.device,
        targets: Targets | None = None,
    ) -> None:
        assert len(pixels) == plan.count, (len(pixels), plan.count)
        self._pixels = pixels
        self._plan = plan
        self._device = numbered(device)
        self._targets = targets

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    def samples_seen(self, step: int) -> int:
        """Images of all processes in the first `step` steps."""
        return self._plan.samples_seen(step)

    def steps(self, start: int, stop: int) -> Iterator[list[Micro]]:
        """The passes of each step from `start` to `stop` - 1; later steps are read meanwhile."""
        calls = (partial(self._read, parts) for parts in self._plan.steps(start, stop))
        with closing(in_advance(calls, AHEAD, AHEAD, self._device)) as steps:
            yield from steps

    def _read(self, parts: list[MicroBatch]) -> list[Micro]:
        return [self._pass(part) for part in parts]

    def _pass(self, part: MicroBatch) -> Micro:
        image = self._pixels.floats(part.rows, self._device)
        targets = self._targets.read(part.rows) if self._targets else None
        if targets is not None:
            targets = tuple(layer.to(self._device, non_blocking=True) for layer in targets)
        return Micro(batch_of(part, image, targets), part.step_images)


def batch_of(
    part: MicroBatch, image: Float[Tensor, "b 3 s s"], targets: Features | None = None
) -> Batch:
    """The images of a pass with their rows and seeds, all on the device of the images."""
    numbers = torch.from_numpy(np.stack([part.rows, part.seeds]))
    if image.device.type == "cuda":
        numbers = numbers.pin_memory().to(image.device, non_blocking=True)
    return Batch(image, *numbers, targets=targets)


def numbered(device: torch.device) -> torch.device:
    """The device with its index: "cuda" means another one in another thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
