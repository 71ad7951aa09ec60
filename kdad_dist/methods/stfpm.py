"""Student-teacher feature pyramid matching (Wang et al., BMVC 2021)."""

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdad_dist.config.methods import StfpmConfig
from kdad_dist.methods.base import Method
from kdad_dist.models.backbone import FeatureNet, build_student, build_teacher
from kdad_dist.models.dropout import drop_by
from kdad_dist.types import Batch, Features, Losses, Prediction


class Stfpm(Method):
    """A student that learns to give the teacher's feature maps, up to their length, on normal
    images. Where it fails on a test image, the image shows something it has not seen.
    """

    blocks = frozenset({"BasicBlock", "Bottleneck"})

    def __init__(self, config: StfpmConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.teacher: FeatureNet = build_teacher(config.teacher, seed)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.student = build_student(config.teacher, seed)
        self.caches_targets = config.cache_teacher
        self.train()

    def forward(self, batch: Batch) -> Losses:
        """Per image, the sum over layers of the mean distance over positions (eq. 2 to 4)."""
        drop_by(self.student, batch.seed)
        image = self._input(batch.image)
        targets = batch.targets if batch.targets is not None else self._teacher_maps(image)
        losses = {
            f"layer{layer}": distance(target, feature).mean(dim=(1, 2))
            for layer, target, feature in zip(
                self.config.teacher.layers, targets, self.student(image), strict=True
            )
        }
        return {"loss": torch.stack(tuple(losses.values())).sum(dim=0), **losses}

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """Anomaly maps; `pred_score` is left to the reduction of the map."""
        height, width = image.shape[-2:]
        return Prediction(combine(self.distances(image), self.config.combine, height, width))

    def distances(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _h _w"]]:
        """How far the student is from the teacher at each position of each layer that is read."""
        image, layers = self._input(image), self.config.teacher.layers
        read = layers if self.config.read_layers is None else self.config.read_layers
        trios = zip(layers, self._teacher_maps(image), self.student(image), strict=True)
        return [distance(target, feature) for layer, target, feature in trios if layer in read]

    def targets(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        return self._teacher_maps(self._input(image))

    def _input(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.teacher.normalize(image) if self.config.normalize else image

    @torch.no_grad()
    def _teacher_maps(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        return self.teacher(image)


def distance(
    target: Float[Tensor, "b c h w"], feature: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    """Squared distance of the two unit vectors at each position, float32, in [0, 4].

    As a difference and not as 2 - 2 cos: the maps multiply values near zero, where the second form
    has lost all its digits.
    """
    difference = F.normalize(target.float()) - F.normalize(feature.float())
    return difference.square().sum(dim=1)


def combine(
    distances: list[Float[Tensor, "b _h _w"]],
    how: Literal["product", "sum", "sum_per_area"],
    height: int,
    width: int,
) -> Float[Tensor, "b {height} {width}"]:
    """One map of the given size from the layers' maps, shallow to deep.

    * product: each is enlarged to the size of the first, they are multiplied, the product is
      enlarged (official).
    * sum: each is enlarged, they are added.
    * sum_per_area: as `sum`, after halving each and dividing it by its number of positions
      (notebook).
    """
    if how == "product":
        first = distances[0].shape[-2:]
        product = prod((enlarge(d, *first) for d in distances[1:]), start=distances[0])
        return enlarge(product, height, width)
    weights = [0.5 / (d.shape[-2] * d.shape[-1]) if how == "sum_per_area" else 1 for d in distances]
    return torch.stack(
        [weight * enlarge(d, height, width) for weight, d in zip(weights, distances, strict=True)]
    ).sum(dim=0)


def enlarge(values: Float[Tensor, "b h w"], height: int, width: int) -> Tensor:
    """Bilinear, with pixel centres at half-integers (as cv2.resize)."""
    return F.interpolate(
        values[:, None], size=(height, width), mode="bilinear", align_corners=False
    ).squeeze(1)
