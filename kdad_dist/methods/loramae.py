"""A masked autoencoder (He et al. 2022) that LoRA adapts to normal images (Hu et al. 2022).

It learns to fill in hidden patches of normal images. A test image is hidden part by part, every
patch exactly once; where it is filled in otherwise than it is, the image shows something new.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdad_dist.config.methods import LoraMaeConfig
from kdad_dist.methods.base import Method
from kdad_dist.models.dropout import drop_by
from kdad_dist.models.mae import patchify, unpatchify
from kdad_dist.models.mae_build import build_mae
from kdad_dist.models.masks import complement, partition, random_masks
from kdad_dist.models.tokens import IMAGENET
from kdad_dist.types import Batch, Losses, Prediction

EPSILON = 1e-6
"""Added to a patch's variance, as in MAE; so an even patch counts as one."""


class LoraMae(Method):
    """A student without a teacher: the image itself says what should have been there."""

    derived = frozenset({"pos_embed", "decoder_pos_embed"})
    blocks = frozenset({"Block"})
    mean: Tensor
    std: Tensor
    hidden: Int64[Tensor, "partitions masks hidden"]
    """Patches that each mask hides; over the masks of a partition, every patch once."""
    visible: Int64[Tensor, "partitions masks visible"]
    """Patches that each mask leaves."""
    place: Int64[Tensor, "partitions patches"]
    """Where in `hidden`, mask after mask, each patch stands."""

    def __init__(self, config: LoraMaeConfig, image_size: int, seed: int) -> None:
        super().__init__()
        self.config = config
        read = config.inference
        self.student = build_mae(config, image_size, seed)
        self.patch, self.patches = self.student.patch, self.student.patches
        masks = [
            partition(self.student.grid, read.masks, read.pattern, seed, number)
            for number in range(read.partitions)
        ]
        hidden = torch.stack(masks)
        visible = torch.stack([complement(m, self.patches) for m in masks])
        self.register_buffer("hidden", hidden, persistent=False)
        self.register_buffer("visible", visible, persistent=False)
        self.register_buffer("place", hidden.flatten(1).argsort(), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET.std).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> Losses:
        """Per image, the mean squared error of its hidden patches (He et al., section 3)."""
        drop_by(self.student, batch.seed)
        image = (batch.image - self.mean) / self.std
        visible, hidden = random_masks(batch.seed, self.patches, self.config.mask_ratio)
        target = patchify(image, self.patch)
        target = target.gather(1, hidden[:, :, None].expand(-1, -1, target.shape[2]))
        if self.config.norm_pix_loss:
            mean, deviation = moments(target)
            target = (target - mean) / deviation
        predicted = self.student(image, visible, hidden)
        return {"loss": (predicted.float() - target).square().mean(dim=(1, 2))}

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """Squared error at each pixel (or the mean over each patch), averaged over the channels
        and the partitions, and what was filled in.
        """
        normal = (image - self.mean) / self.std
        filled = self.fillings(normal)
        return Prediction(
            anomaly_map=self.error_map(normal, filled), reconstruction=self.picture(filled.mean(0))
        )

    def fillings(
        self, image: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "partitions b patches values"]:
        """What each partition's masks make the student put in the place of every patch of a
        normalised image, on the image's own scale.
        """
        filled = torch.stack([self.fill(image, number) for number in range(len(self.hidden))])
        if not self.config.norm_pix_loss:
            return filled
        mean, deviation = moments(patchify(image, self.patch))
        return filled * deviation + mean

    def error_map(
        self, image: Float[Tensor, "b 3 h w"], filled: Float[Tensor, "partitions b patches values"]
    ) -> Float[Tensor, "b h w"]:
        """How far the fillings are from the normalised image."""
        read, target = self.config.inference, patchify(image, self.patch)
        error = filled - target
        if read.error == "normalised":
            error = error / moments(target).deviation
        error = error.square().mean(dim=0)
        if read.map == "patch":
            error = error.mean(dim=2, keepdim=True).expand_as(error)
        return unpatchify(error, self.patch).mean(dim=1)

    def fill(
        self, image: Float[Tensor, "b 3 h w"], partition: int
    ) -> Float[Tensor, "b patches values"]:
        """What the student puts in the place of each patch while its mask hides it.

        All masks of all images go through the student at once.
        """
        hidden, visible = self.hidden[partition], self.visible[partition]
        masks, images = len(hidden), image.shape[0]
        predicted = self.student(
            image.repeat_interleave(masks, dim=0),
            visible.repeat(images, 1),
            hidden.repeat(images, 1),
        )
        in_order = self.place[partition]
        return predicted.float().view(images, self.patches, -1)[:, in_order]

    def picture(self, patches: Float[Tensor, "b patches values"]) -> Float[Tensor, "b 3 h w"]:
        """Patches of a normalised image as RGB in [0, 1]."""
        return (unpatchify(patches, self.patch) * self.std + self.mean).clamp(0, 1)


class Moments(NamedTuple):
    mean: Float[Tensor, "b patches 1"]
    deviation: Float[Tensor, "b patches 1"]


def moments(patches: Float[Tensor, "b patches values"]) -> Moments:
    """Mean and deviation of the values of each patch, unbiased as in MAE's code."""
    mean = patches.mean(dim=2, keepdim=True)
    # Not `var`, which warns of a batch without images.
    variance = (patches - mean).square().sum(dim=2, keepdim=True) / (patches.shape[2] - 1)
    return Moments(mean, (variance + EPSILON).sqrt())
