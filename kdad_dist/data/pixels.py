"""Decoded images: where their pixels live, and how they get to the device."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from kdad_dist.data.cache import cache_root, filled_array
from kdad_dist.data.index import Index, Sample
from kdad_dist.data.plan import Rows
from kdad_dist.data.reader import FIT_VERSION, ShardReader
from kdad_dist.data.threads import Decoder
from kdad_dist.errors import ConfigError
from kdad_dist.tiling import Tiling
from kdad_dist.types import Poll, go_on


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
        chosen = sent(rows, self._images.device)
        return self._images.index_select(0, chosen).permute(0, 3, 1, 2)


class TiledPixels(Pixels):
    """Tiles of images in a memory-mapped file, each a row of its own: row r is tile r % n of image
    r // n.
    """

    def __init__(self, images: NDArray[np.uint8], tiling: Tiling, pin: bool) -> None:
        side = (tiling.tile, tiling.tile)
        windows = sliding_window_view(images, side, axis=(1, 2))  # a view: nothing is copied
        self._windows = windows.transpose(0, 1, 2, 4, 5, 3)
        self._corners = np.array(tiling.corners)
        self._images = len(images)
        self._pin = pin

    def __len__(self) -> int:
        return self._images * len(self._corners)

    def read(self, rows: Rows) -> UInt8[Tensor, "b 3 t t"]:
        image, tile = np.divmod(rows, len(self._corners))
        top, left = self._corners[tile].T
        shape = (len(rows), *self._windows.shape[3:])
        taken = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        taken.numpy()[:] = self._windows[image, top, left]
        return taken.permute(0, 3, 1, 2)


def take(array: NDArray, rows: Rows, pin: bool) -> Tensor:
    """Rows of an array as a tensor of their own, in page-locked memory where `pin`."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    taken = torch.empty((len(rows), *array.shape[1:]), dtype=dtype, pin_memory=pin)
    # mode="clip" writes straight into `out`; the plan's rows are in range.
    np.take(array, rows, axis=0, out=taken.numpy(), mode="clip")
    return taken


def open_pixels(
    samples: Sequence[Sample],
    index: Index,
    image_size: int,
    cache: str,
    device: torch.device,
    poll: Poll = go_on,
    tiling: Tiling | None = None,
    margin: int = 0,
) -> Pixels:
    """The samples' pixels, decoded once ("ram", "device") or whenever they are read ("none").

    With "ram" and "device" one process per node decodes them into a file below `cache_root()`,
    where later runs find them; "device" then copies them to each device.

    Args:
        tiling: with "ram", how images are cut into tiles, which are then the rows.
        margin: pixels by which images are read larger before their centre is cut out.

    Raises:
        DataError: a sample is damaged, or the cache has no room.
        ConfigError: the images were packed too small, or the device has no room.
    """
    decoder = Decoder(ShardReader(index.root, image_size, margin).image, image_size)
    pin = device.type == "cuda"
    if cache == "none":
        return DecodedPixels(samples, decoder, pin)
    with closing(decoder):
        images = filled_array(
            cache_root() / "pixels" / pixel_key(samples, index, image_size, margin),
            (len(samples), image_size, image_size, 3),
            np.uint8,
            lambda array: decoder.into(array, samples, poll),
            f"the pixels of {len(samples)} images of {index.root}",
            poll,
        )
    if tiling is not None and tiling.count > 1:
        assert cache == "ram", cache
        return TiledPixels(images, tiling, pin)
    return DevicePixels(images, device) if cache == "device" else CachedPixels(images, pin)


def pixel_key(samples: Sequence[Sample], index: Index, image_size: int, margin: int = 0) -> str:
    """Name of a pixel cache: a hash of all that decides what it holds."""
    size = f"{image_size} of {image_size + margin}" if margin else str(image_size)
    parts = [index.fingerprint, size, str(FIT_VERSION), *(s.key for s in samples)]
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


def sent(numbers: Rows, device: torch.device) -> Tensor:
    """A small array on the device, by a copy that nobody waits for."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def stacked(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Float[Tensor, "b 3 s s"]:
    """Images (s, s, 3) as a batch in [0, 1] on the device."""
    return to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), device)
