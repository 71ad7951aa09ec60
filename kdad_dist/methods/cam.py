"""What a classifier looks at: Grad-CAM and Grad-CAM++ on the last feature map of a network.

Nothing of the network is changed and no `.grad` is left behind.
"""

import logging
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdad_dist.errors import ConfigError

log = logging.getLogger(__name__)
Kind = Literal["gradcam", "gradcam++"]


class TwoHalves(Protocol):
    """A classifier that can be asked for its last feature map, and for what follows from it."""

    def features(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c _h _w"]: ...

    def classify(self, features: Float[Tensor, "b c _h _w"]) -> Float[Tensor, "b k"]: ...


class Evidence(NamedTuple):
    """What a network looks at in a batch of images, and what it takes them for."""

    maps: dict[Kind, Float[Tensor, "b h w"]]
    """In [0, 1], at the size of the images."""
    logits: Float[Tensor, "b k"]


def refuse_flat(name: str, network: TwoHalves, image: Float[Tensor, "b 3 h w"]) -> None:
    """Refuses a network whose last features lie in no rows and columns; warns of a single position,
    whose maps are the same everywhere.

    Raises:
        ConfigError: naming their shape.
    """
    with torch.no_grad():
        shape = tuple(network.features(image).shape)
    if len(shape) != 4:
        raise ConfigError(
            f"method.explain: the last features of the {name} have the shape {shape}, so there are "
            "no rows and columns whose evidence could be drawn over an image",
            "set method.explain=false (and method.beside=null), or choose a convolutional network "
            "such as resnet18",
        )
    if shape[2:] == (1, 1):
        log.warning(
            "the last features of the %s are 1 x 1 in images of %d pixels: its maps are the same "
            "everywhere and agree with none; train at a larger data.image_size to compare them",
            name,
            image.shape[-1],
        )


def evidence(
    network: TwoHalves, image: Float[Tensor, "b 3 h w"], label: Int64[Tensor, " b"]
) -> Evidence:
    """Both maps of the evidence for a class in each image.

    The network is in eval mode, where each image's logits depend on that image alone.

    Args:
        label: the class of each image whose logit is explained.
    """
    with torch.no_grad():
        maps = network.features(image)
    with torch.enable_grad():
        logits = network.classify(maps.requires_grad_())
        (gradient,) = torch.autograd.grad(logits.gather(1, label[:, None]).sum(), maps)
    maps = maps.detach()

    def drawn(weights: Tensor) -> Tensor:
        found = (weights[:, :, None, None] * maps).sum(1, keepdim=True).relu()
        large = F.interpolate(found, image.shape[-2:], mode="bilinear", align_corners=False)
        highest = large.amax((2, 3), keepdim=True)
        return (large / highest.clamp_min(torch.finfo(large.dtype).tiny)).squeeze(1)

    drawings: dict[Kind, Tensor] = {
        "gradcam": drawn(mean_weights(maps, gradient)),
        "gradcam++": drawn(higher_weights(maps, gradient)),
    }
    return Evidence(drawings, logits.detach())


def mean_weights(
    maps: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c"]:
    """The mean gradient of each channel (Selvaraju et al. 2017, eq. 1)."""
    return gradient.mean((2, 3))


def higher_weights(
    maps: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c"]:
    """The positive gradients, each weighted by its own alpha (Chattopadhay et al. 2018).

    alpha = g^2 / (2 g^2 + sum(A) g^3) (eq. 19, where the score is exp(logit) and only first
    derivatives remain), here divided by g^2; weight = sum(alpha relu(g)) (eq. 5). The factor
    exp(logit), common to a whole image, is left out, for maps are stretched to 1.
    """
    below = 2 + maps.sum((2, 3), keepdim=True) * gradient
    alpha = torch.where(below != 0, 1 / below, 0)
    return (alpha * gradient.relu()).sum((2, 3))
