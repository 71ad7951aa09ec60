"""Where a score comes from: its gradient with respect to the image, plain, smoothed or guided.

Nothing of the network is changed and no `.grad` is left behind, so that several threads may ask the
same network at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from kdad_dist.draws import normal

Score = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, " b"]]
"""Scores of images, each of which depends on its own image alone."""
CLIP = 0.99
"""Quantile of an image's map at which it is cut off before it is stretched to [0, 1]."""
CPU_PIXELS, GPU_PIXELS = 1 << 16, 1 << 20
"""Of noisy copies that go through the networks at a time. On a CPU, fewer leave it waiting for
weights, and more for memory, beyond its caches; a GPU wants to be busy."""


def input_gradient(
    score: Score, image: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, " b"]]:
    """The gradient of each image's score with respect to the image, and the scores."""
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        values = score(image)
        (gradient,) = torch.autograd.grad(values.sum(), image, materialize_grads=True)
    return gradient, values.detach()


def smooth_gradient(
    score: Score, image: Float[Tensor, "b 3 h w"], copies: int, deviation: float, seed: int
) -> Float[Tensor, "b 3 h w"]:
    """The mean gradient over noisy copies of the images (Smilkov et al. 2017).

    A copy's noise is drawn from (seed, copy) and is the same for every image, so that the result
    does not depend on the batch that an image stands in.
    """
    number = torch.tensor([seed], device=image.device)
    at_once = CPU_PIXELS if image.device.type == "cpu" else GPU_PIXELS
    images = max(1, min(len(image), at_once // image[0, 0].numel()))
    together = max(1, at_once // (images * image[0, 0].numel()))
    total = torch.zeros_like(image)
    for first in range(0, copies, together):
        noise = [
            deviation * normal(number, image[0].numel(), stream=copy).view(image.shape[1:])
            for copy in range(first, min(first + together, copies))
        ]
        for part, sums in zip(image.split(images), total.split(images), strict=True):
            noisy = torch.cat([part + drawn for drawn in noise])
            sums += input_gradient(score, noisy)[0].unflatten(0, (len(noise), len(part))).sum(dim=0)
    return total / copies


def magnitude(gradient: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """The gradient's absolute values, added over the colours."""
    return gradient.float().abs().sum(dim=1)


def stretched(maps: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Each map cut off at its own 99th percentile and stretched to [0, 1], however it was made;
    maps of different images can then not be compared any more.
    """
    pixels = maps.flatten(1)
    low = pixels.amin(dim=1)[:, None, None]
    high = pixels.quantile(CLIP, dim=1)[:, None, None]
    span = (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return ((maps - low) / span).clamp(0, 1)


class Guided(TorchFunctionMode):
    """Within it, the ReLUs of this thread pass on only gradients that are positive, in the places
    where their input was (guided backpropagation, Springenberg et al. 2015).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _RELUS:
            return _GuidedRelu.apply(args[0])
        return func(*args, **(kwargs or {}))


_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class _GuidedRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        result = values.clamp_min(0)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, gradient: Tensor
    ) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradient.clamp_min(0) * (result > 0)
