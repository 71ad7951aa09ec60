"""The cloner: a small student of plain convolutions whose maps have the shapes of its teacher's.

For the pools of a VGG16 it is that of Salehi et al. (CVPR 2021): 343,984 parameters where it is
small, 14,715,968 where it has the teacher's widths. For other backbones it follows the same rule.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError
from kdad_dist.models.backbone import Level
from kdad_dist.types import Features

SMALL = 16
"""Width of the small cloner, where its teacher does not ask for another."""


class Stage(nn.Sequential):
    """Convolutions of one resolution, and the max-pooling that halves it.

    3 x 3 with BatchNorm and ReLU, but no BatchNorm after the last.
    """

    def __init__(self, channels: Sequence[int], bias: bool) -> None:
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(channels), 2):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=bias)
            nn.init.xavier_uniform_(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
            layers.append(convolution)
            if number < len(channels):
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU())
        super().__init__(*layers, nn.MaxPool2d(2))


class Cloner(nn.Module):
    """Stages one after the other; the chosen ones' outputs are its maps."""

    def __init__(self, stages: Sequence[Stage], chosen: Sequence[bool]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.chosen = tuple(chosen)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        """The maps of the chosen stages, shallow to deep. `b` may be 0."""
        maps = []
        for stage, chosen in zip(self.stages, self.chosen, strict=True):
            image = stage(image)
            if chosen:
                maps.append(image)
        return tuple(maps)


def build_cloner(
    chosen: Sequence[Level],
    levels: Sequence[Level],
    size: Literal["small", "equal"],
    bias: bool,
    seed: int,
) -> Cloner:
    """A cloner with a map for each chosen level, in channels-last memory format.

    Stage k ends at stride 2^k. It has two convolutions, from the third stage on three; the last
    one has as many channels as the teacher where that level is chosen. All others are 16 wide, or
    as wide as the teacher there.

    Args:
        chosen: levels of the teacher that the student answers to, shallow to deep.
        levels: all that the teacher has, shallow to deep.

    Raises:
        ConfigError: two levels have the same stride, or one is no power of 2.
    """
    wanted = {level.stride: level.channels for level in chosen}
    if len(wanted) < len(chosen) or any(stride < 2 or stride & (stride - 1) for stride in wanted):
        raise ConfigError(
            f"a {size} cloner halves the image from level to level, and method.teacher.layers are "
            f"at strides {', '.join(str(level.stride) for level in chosen)}",
            "choose layers at different strides that are powers of 2, or method.student=same",
        )
    stages, before = [], 3
    strides = [2**k for k in range(1, max(wanted).bit_length())]
    with seeded(seed, "student"):
        for stride in strides:
            width = SMALL
            if size == "equal":  # where the teacher has nothing, as wide as what follows
                width = next(level.channels for level in levels if level.stride >= stride)
            hidden = [width] * (1 if stride <= 4 else 2)
            channels = [before, *hidden, wanted.get(stride, width)]
            stages.append(Stage(channels, bias))
            before = channels[-1]
    cloner = Cloner(stages, [stride in wanted for stride in strides])
    return cloner.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
