"""What a method says of large images by their tiles, put together without seams."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kdad_dist.tiling import Tiling
from kdad_dist.types import Prediction

Predict = Callable[[Float[Tensor, "b 3 t t"]], Prediction]


def predict_tiles(
    predict: Predict, image: Float[Tensor, "b 3 s s"], tiling: Tiling, largest: int | None
) -> Prediction:
    """What `predict` says of the tiles of each image, as if it had said so of the image.

    Maps and reconstructions are blended; a score that is not read from a map is that of the most
    anomalous tile.

    Args:
        largest: tiles that go through the network together, at most; None: all of them.
    """
    tiles = cut(image, tiling)
    said = [predict(part) for part in (tiles.split(largest) if largest else [tiles])]

    def joined(name: str) -> Tensor | None:
        parts = [getattr(part, name) for part in said]
        return None if parts[0] is None else torch.cat(parts).float()

    maps, scores, pictures = map(joined, ("anomaly_map", "pred_score", "reconstruction"))
    return Prediction(
        anomaly_map=None if maps is None else blend(maps[:, None], tiling)[:, 0],
        pred_score=None if scores is None else scores.unflatten(0, (-1, tiling.count)).amax(1),
        reconstruction=None if pictures is None else blend(pictures, tiling),
    )


def cut(image: Float[Tensor, "b c s s"], tiling: Tiling) -> Float[Tensor, "b*n c t t"]:
    """The tiles of each image, image by image, in channels_last memory."""
    side = tiling.tile
    tiles = [image[..., top : top + side, left : left + side] for top, left in tiling.corners]
    stacked = torch.stack(tiles, dim=1).flatten(0, 1)
    return stacked.contiguous(memory_format=torch.channels_last)


def blend(tiles: Float[Tensor, "b*n c t t"], tiling: Tiling) -> Float[Tensor, "b c s s"]:
    """The images whose tiles these are: where tiles overlap, their weighted mean.

    A tile's weight sinks to almost nothing towards its borders, where its network saw least around
    it, so that nothing jumps where a tile begins; a constant stays one.
    """
    side, size = tiling.tile, tiling.image_size
    lines = line_weights(tiling).to(tiles)
    number = len(lines)
    weight = lines[:, None, :, None] * lines[None, :, None, :]
    weighted = tiles.unflatten(0, (-1, number * number)) * weight.flatten(0, 1)[:, None]
    image = tiles.new_zeros(weighted.shape[0], tiles.shape[1], size, size)
    for place, (top, left) in enumerate(tiling.corners):
        image[..., top : top + side, left : left + side] += weighted[:, place]
    return image


def line_weights(tiling: Tiling) -> Float[Tensor, "n t"]:
    """The weights of a line of tiles along it: raised cosines (Hann), which sum to 1 everywhere."""
    phase = (torch.arange(tiling.tile, dtype=torch.float64) + 0.5) / tiling.tile
    window = (torch.pi * phase).sin().square()
    total = torch.zeros(tiling.image_size, dtype=torch.float64)
    for start in tiling.starts:
        total[start : start + tiling.tile] += window
    shares = [window / total[start : start + tiling.tile] for start in tiling.starts]
    return torch.stack(shares).float()
