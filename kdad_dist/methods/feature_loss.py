"""How far a student's features are from a teacher's: by their values, and by their direction.

Shared by the methods of the distillation family. Features are maps (b, c, h, w) or tokens
(b, t, c); each image's are one long vector per layer (Salehi et al., CVPR 2021, eq. 1 to 3).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Terms(NamedTuple):
    """Of each image, summed over layers."""

    value: Float[Tensor, " b"]
    direction: Float[Tensor, " b"]


def terms(targets: Iterable[Tensor], features: Iterable[Tensor]) -> Terms:
    """Both distances of each image, float32, summed over the pairs of layers."""
    pairs = [(_vectors(t), _vectors(s)) for t, s in zip(targets, features, strict=True)]
    return Terms(
        torch.stack([value(target, feature) for target, feature in pairs]).sum(dim=0),
        torch.stack([direction(target, feature) for target, feature in pairs]).sum(dim=0),
    )


def value(target: Float[Tensor, "b ..."], feature: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Mean squared difference of each image's values."""
    return (target - feature).square().flatten(1).mean(dim=1)


def direction(
    target: Float[Tensor, "b ..."], feature: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """1 - cosine of each image's two vectors, in [0, 2].

    As half the squared distance of the unit vectors: its digits stay where they almost agree. A
    vector of zeros has no direction: it is 1, as of one that is orthogonal.
    """
    one, other = F.normalize(target.flatten(1)), F.normalize(feature.flatten(1))
    zeros = (~one.any(dim=1)).float() + (~other.any(dim=1)).float()  # whose squared length is not 1
    return ((one - other).square().sum(dim=1) + zeros) / 2


def _vectors(features: Float[Tensor, "b ..."]) -> Float[Tensor, "b n"]:
    """Each image's features in a row, float32; maps as channels-last networks leave them in memory,
    so that nothing is copied.
    """
    if features.dim() == 4:
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1).float()
