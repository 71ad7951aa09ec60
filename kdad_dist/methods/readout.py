"""From a method's raw map to what is reported: smoothing, and the reduction to one score."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.config.changes import flatten
from kdad_dist.config.load import plain
from kdad_dist.config.run import RunConfig, ScoreConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.tiles import predict_tiles
from kdad_dist.tiling import Tiling
from kdad_dist.types import Prediction

FLOOR = 0.1
"""Share of the average deviation that is added to each position's: few normal images may all agree
at a position by chance."""


class Moments(NamedTuple):
    """Sums over the maps of some normal images, in float64."""

    images: int
    total: Float[Tensor, "h w"]
    squares: Float[Tensor, "h w"]

    @classmethod
    def of(cls, maps: Float[Tensor, "b h w"]) -> "Moments":
        maps = maps.double()
        return cls(len(maps), maps.sum(0), maps.square().sum(0))


@dataclass(frozen=True)
class Standard:
    """What the maps of normal images look like at each position."""

    mean: Float[Tensor, "h w"]
    deviation: Float[Tensor, "h w"]

    @classmethod
    def of(cls, units: Iterable[Moments]) -> "Standard":
        """From one image or more; units are added in their order, which decides the last bits."""
        images, totals, squares = zip(*units, strict=True)
        mean = torch.stack(totals).sum(0) / sum(images)
        deviation = (torch.stack(squares).sum(0) / sum(images) - mean.square()).clamp_min(0).sqrt()
        floor = FLOOR * deviation.mean() + torch.finfo(torch.float32).tiny
        return cls(mean.float(), (deviation + floor).float())

    def __call__(self, anomaly_map: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
        """Deviations above the normal mean; what lies below it is not anomalous."""
        mean, deviation = self.mean.to(anomaly_map), self.deviation.to(anomaly_map)
        return ((anomaly_map - mean) / deviation).clamp_min(0)


class Readout(nn.Module):
    """Images in, smoothed anomaly maps and scores out: all of a detector that computes.

    Args:
        tiling: how images are cut for the method.
        standard: of the smoothed maps of normal images; None: maps stay as they are.
    """

    def __init__(
        self,
        method: Method,
        config: ScoreConfig,
        tiling: Tiling,
        standard: Standard | None = None,
    ) -> None:
        super().__init__()
        self.method = method.eval()
        self.config = config
        self.tiling = tiling
        self.standard = standard

    @torch.no_grad()
    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """RGB in [0, 1]; `pred_score` is always given, `anomaly_map` where the method has one."""
        reduced = self.config.precision == "bf16"
        with torch.autocast(image.device.type, torch.bfloat16, enabled=reduced):
            raw = self.predict(image, self.config.batch_size)
        return self.finish(raw)

    def predict(self, image: Float[Tensor, "b 3 h w"], largest: int | None) -> Prediction:
        """What the method says of whole images; `largest` as for `predict_tiles`."""
        if self.tiling.count == 1:
            return self.method.predict(image)
        return predict_tiles(self.method.predict, image, self.tiling, largest)

    def finish(self, raw: Prediction) -> Prediction:
        """What is reported of what the method says of a batch."""
        config = self.config
        if raw.anomaly_map is None:
            return raw
        anomaly_map = smooth(raw.anomaly_map.float(), config.smooth_sigma, config.smooth_radius)
        if config.opening:
            anomaly_map = opened(anomaly_map)
        if self.standard is not None:
            anomaly_map = self.standard(anomaly_map)
        score = raw.pred_score if raw.pred_score is not None else reduce(anomaly_map, config)
        return replace(raw, anomaly_map=anomaly_map, pred_score=score.float())


def readout_of(config: RunConfig) -> str:
    """What decides the scores of given weights, in words: where it differs, no threshold holds."""
    values = plain(config)
    score, method = values["score"], values["method"]
    names = ("reduce", "topk", "quantile", "smooth_sigma", "smooth_radius", "opening")
    parts = {name: score[name] for name in (*names, "standardise", "precision")}
    parts |= {name: method[name] for name in config.method.READING}
    parts["image_size"] = config.data.image_size
    if config.data.centre_margin:
        parts["centre_margin"] = config.data.centre_margin
    if config.data.tile:
        parts |= {name: values["data"][name] for name in ("tile", "tile_overlap")}
    if config.method.draws_to_read:
        parts["seed"] = config.seed
    return ", ".join(f"{name} {value}" for name, value in flatten(parts))


def reduce(anomaly_map: Float[Tensor, "b h w"], config: ScoreConfig) -> Float[Tensor, " b"]:
    """The score of each image, from the pixels of its map."""
    pixels = anomaly_map.flatten(1)
    match config.reduce:
        case "max":
            return pixels.amax(1)
        case "topk":
            return pixels.topk(min(config.topk, pixels.shape[1]), dim=1).values.mean(1)
        case "quantile":
            return pixels.quantile(config.quantile, dim=1)
        case "mean":
            return pixels.mean(1)


def smooth(
    anomaly_map: Float[Tensor, "b h w"], sigma: float, radius: int | None = None
) -> Float[Tensor, "b h w"]:
    """A Gaussian blur of the same size, mirrored at the borders; none where sigma is 0.

    Two products with banded matrices: exact at the borders, the same on every device, and faster
    than a convolution with one channel.

    Args:
        radius: pixels at which the Gaussian is cut off, so that its kernel has 2 radius + 1 values;
            4 sigma where not given.
    """
    if sigma == 0:
        return anomaly_map
    if radius is None:
        radius = int(4 * sigma + 0.5)
    height, width = anomaly_map.shape[-2:]
    down = blur_matrix(height, sigma, radius).to(anomaly_map)
    across = blur_matrix(width, sigma, radius).to(anomaly_map)
    return (down @ anomaly_map @ across.T).clamp_min(0)


def opened(anomaly_map: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """The grey-scale opening by a cross of 3 x 3: peaks into which it does not fit are levelled.

    Above any threshold, it leaves what the binary opening of the thresholded map leaves.
    """
    return _dilated(-_dilated(-anomaly_map))


def _dilated(values: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """The largest value of each position and its four neighbours."""
    down = F.max_pool2d(values, (3, 1), stride=1, padding=(1, 0))
    across = F.max_pool2d(values, (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(down, across)


def blur_matrix(size: int, sigma: float, radius: int) -> Float[Tensor, "size size"]:
    """The matrix that blurs a line of `size` values; its rows sum to 1."""
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    # d c b a | a b c d | d c b a: position i beyond the end is position 2 * size - 1 - i.
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)
    source = torch.where(source >= size, 2 * size - 1 - source, source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, source, (kernel / kernel.sum()).expand(size, -1).contiguous())
    return matrix.float()
