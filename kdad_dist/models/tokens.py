"""Transformers as teachers: a function from images to the tokens of chosen layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.errors import ConfigError

Tokens = tuple[Float[Tensor, "b tokens width"], ...]
"""Of the chosen layers, shallow to deep. First those that belong to no patch (a class token), then
the patches, row by row."""


class Form(NamedTuple):
    """What the tokens of a layer look like."""

    width: int
    prefix: int
    """Tokens that belong to no patch."""
    patch: int
    """Side of a patch, in pixels."""
    grid: int
    """Patches in each direction."""


class Colours(NamedTuple):
    """Statistics of the images that a network expects, per channel."""

    mean: Sequence[float]
    std: Sequence[float]


IMAGENET = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = Colours((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class TokenNet(nn.Module, ABC):
    """A transformer, read after its blocks.

    Args:
        layers: counted from 1, which is what the first block gives; ascending.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, form: Form, layers: Sequence[int], colours: Colours) -> None:
        super().__init__()
        self.form, self.layers = form, tuple(layers)
        self.register_buffer("mean", torch.tensor(colours.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(colours.std).view(3, 1, 1), persistent=False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        """The chosen layers' tokens of RGB images in [0, 1]. `b` may be 0."""
        if image.shape[0] == 0:  # which breaks the reshapes of transformers
            return tuple(tokens[:0] for tokens in self(image.new_zeros(1, *image.shape[1:])))
        return self.tokens((image - self.mean) / self.std)

    @abstractmethod
    def tokens(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        """As `forward`, of one normalised image or more."""


def check_layers(name: str, layers: Sequence[int], depth: int) -> None:
    """Raises ConfigError where a layer does not exist, or they are not in order."""
    if list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"method.teacher.layers is {list(layers)}",
            "name each layer once, from shallow to deep",
        )
    if layers[-1] > depth:
        raise ConfigError(
            f"method.teacher.layers is {list(layers)}, but {name} has the layers 1 to {depth}",
            "name layers that exist",
        )
