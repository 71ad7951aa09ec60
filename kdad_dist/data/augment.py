"""Seeded changes of training images: another window, brightness, saturation, mirrored.

What an image becomes depends on its seed alone, not on the batch in which it stands: there is no
operation here that rounds twice (multiply and add in one, `lerp`), which would round otherwise
in the remainder of a vectorised loop and on another device.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdad_dist.config.data import AugmentConfig
from kdad_dist.draws import uniform

Augment = Callable[[Float[Tensor, "b 3 _s _s"], Int64[Tensor, " b"]], Float[Tensor, "b 3 s s"]]
"""Images of a pass and the seeds of their rows in this epoch, to the images that are learnt."""
STREAM = 1
"""Of the draws: masks are drawn from stream 0."""
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def augment(
    image: Float[Tensor, "b 3 _s _s"], seed: Int64[Tensor, " b"], size: int, config: AugmentConfig
) -> Float[Tensor, "b 3 {size} {size}"]:
    """Images in [0, 1], each changed as its seed says; in the memory format of `image`.

    Each option has draws of its own, so that one does not change what another does. The host
    waits for nothing.

    Args:
        image: larger than `size` where a window is to be chosen at random.
    """
    top, left, mirror, brightness, saturation = uniform(seed, 5, STREAM).T
    if image.shape[-1] != size:
        image = window(image, top, left, size)
    if config.flip:
        image = torch.where(_each(mirror < 0.5), image.flip(-1), image)
    if config.brightness:
        image = (image * _factor(brightness, config.brightness)).clamp_(0, 1)
    if config.saturation:
        image = saturated(image, _factor(saturation, config.saturation))
    return image


def window(
    image: Float[Tensor, "b 3 _s _s"],
    top: Float[Tensor, " b"],
    left: Float[Tensor, " b"],
    size: int,
) -> Float[Tensor, "b 3 {size} {size}"]:
    """One of all the windows of each image; `top` and `left` in [0, 1) say which."""
    windows = image.unfold(2, size, 1).unfold(3, size, 1)  # a view: nothing is copied
    places = windows.shape[2]
    row, column = (top * places).long(), (left * places).long()
    return windows[torch.arange(len(image), device=image.device), :, row, column]


def saturated(
    image: Float[Tensor, "b 3 h w"], factor: Float[Tensor, "b 1 1 1"]
) -> Float[Tensor, "b 3 h w"]:
    """Blends each image with its grey picture: factor 0 is grey, 1 the image itself."""
    red, green, blue = (image[:, i : i + 1] * weight for i, weight in enumerate(GREY))
    grey = red.add_(green).add_(blue)
    return (image * factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def _factor(draw: Float[Tensor, " b"], largest: float) -> Float[Tensor, "b 1 1 1"]:
    """In [1 - largest, 1 + largest)."""
    return _each(1 + largest * (2 * draw - 1))


def _each(value: Tensor) -> Tensor:
    """One value for each image, against its pixels."""
    return value[:, None, None, None]
