"""Multiresolution knowledge distillation (Salehi et al., CVPR 2021)."""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.config.methods import MkdConfig
from kdad_dist.errors import ConfigError
from kdad_dist.methods.base import Method
from kdad_dist.methods.feature_loss import Terms, terms
from kdad_dist.methods.saliency import (
    Guided,
    input_gradient,
    magnitude,
    smooth_gradient,
    stretched,
)
from kdad_dist.models.backbone import FeatureNet, Level, build_student, build_teacher
from kdad_dist.models.cloner import build_cloner
from kdad_dist.models.dropout import drop_by
from kdad_dist.types import Batch, Features, Losses, Prediction

BALANCE = "direction_balance"
BALANCED_OVER = 64
"""Images over which the two terms are made equal."""
ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")
GATES = {"Sigmoid", "Hardsigmoid", "Softmax"}
"""Activations that weigh features and stand in no ReLU's place."""


class Mkd(Method):
    """A student that learns the values and the direction of the teacher's maps on normal images;
    the gradient of its failure shows where in a test image the reason lies.
    """

    wants_images: int
    blocks = frozenset({"Stage", "BasicBlock", "Bottleneck"})

    def __init__(self, config: MkdConfig, image_size: int, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.teacher: FeatureNet = build_teacher(config.teacher, seed)  # pyright: ignore[reportIncompatibleVariableOverride]
        if config.student == "same":
            self.student = build_student(config.teacher, seed)
        else:
            factor = 2 if config.pool else 1
            chosen, levels = (
                [Level(level.channels, factor * level.stride) for level in part]
                for part in (self.teacher.chosen_levels, self.teacher.levels)
            )
            self.student = build_cloner(chosen, levels, config.student, config.use_bias, seed)
        self.caches_targets = config.cache_teacher
        self.wants_images = BALANCED_OVER if config.balance else 0
        if config.balance:
            self.student.register_buffer(BALANCE, torch.ones(()))
        self._check(image_size)
        self.train()

    def forward(self, batch: Batch) -> Losses:
        """Per image, both distances summed over the layers, and their weighted sum."""
        drop_by(self.student, batch.seed)
        image = self._input(batch.image)
        targets = batch.targets
        if targets is None:
            with torch.no_grad():
                targets = self._teacher_maps(image)
        found = terms(targets, self._student_maps(image))
        return {"loss": self._weighted(found), **found._asdict()}

    @torch.no_grad()
    def prepare(self, image: Float[Tensor, "b 3 h w"]) -> None:
        """Finds the factor that makes both terms equal (Salehi et al., section 3.1)."""
        twin = copy.deepcopy(self)  # whose BatchNorms count these images
        twin.train()
        drop_by(twin, torch.arange(len(image), device=image.device))
        image = self._input(image)
        found = terms(twin._teacher_maps(image), twin._student_maps(image))
        self._balance.copy_(found.value.sum() / found.direction.sum().clamp_min(1e-12))

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """The score of each image, and the map that `method.localise` asks for."""
        config = self.config
        if config.localise == "none":
            return Prediction(pred_score=self.score(image))
        if config.localise == "smoothgrad":
            score = self.score(image)
            copies = (config.noise_copies, config.noise_deviation, self.seed)
            gradient = smooth_gradient(self.score, image, *copies)
        else:
            gradient, score = input_gradient(self.score, image)
        maps = magnitude(gradient)
        return Prediction(stretched(maps) if config.stretch_maps else maps, score)

    def score(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """The loss on the layers that are read."""
        image = self._input(image)
        guided = Guided() if self.config.localise == "guided" else nullcontext()
        with guided:
            features = self._read(self._student_maps(image))
        targets = self._pooled(self._read(self.teacher(image)))
        return self._weighted(terms(targets, features))

    def targets(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        with torch.no_grad():
            return self._teacher_maps(self._input(image))

    @property
    def _balance(self) -> Tensor:
        # The student may be wrapped by now.
        buffers = self.student.named_buffers()
        return next(buffer for name, buffer in buffers if name.endswith(BALANCE))

    def _weighted(self, found: Terms) -> Float[Tensor, " b"]:
        value, direction = found
        if self.config.balance:
            direction = self._balance * direction
        return self.config.value_weight * value + self.config.direction_weight * direction

    def _input(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.teacher.normalize(image) if self.config.normalize else image

    def _read(self, maps: Features) -> Features:
        layers = self.config.teacher.layers
        return tuple(m for m, layer in zip(maps, layers, strict=True) if layer in self.config.read)

    def _teacher_maps(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        return self._pooled(self.teacher(image))

    def _student_maps(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        maps = self.student(image)
        return self._pooled(maps) if self.config.student == "same" else maps

    def _pooled(self, maps: Features) -> Features:
        return tuple(F.max_pool2d(m, 2) for m in maps) if self.config.pool else maps

    def _check(self, image_size: int) -> None:
        """Raises ConfigError where the networks do not fit each other at this size of image, or
        have no ReLU to guide.
        """
        twin = copy.deepcopy(self).to("meta").eval()  # where nothing is computed
        image = torch.zeros(2, 3, image_size, image_size, device="meta")
        try:
            maps = (twin._teacher_maps(image), twin._student_maps(image))
        except RuntimeError as error:
            raise ConfigError(
                f"data.image_size (or data.tile) {image_size} is too small for "
                f"method.teacher.layers {self.config.teacher.layers}: {str(error).splitlines()[0]}",
                "choose larger images, or shallower layers",
            ) from error
        one, other = ([tuple(m.shape[1:]) for m in part] for part in maps)
        if one != other:
            raise ConfigError(
                f"at data.image_size (or data.tile) {image_size} the teacher's maps are {one}, "
                f"the student's {other}",
                "choose a size that the teacher's strides divide, or method.student=same",
            )
        if self.config.localise == "guided":
            self._check_guided()

    def _check_guided(self) -> None:
        """Raises ConfigError where the student has other activations than ReLU."""
        kinds = {type(module) for module in self.student.modules()}
        names = {kind.__name__ for kind in kinds if kind.__module__.startswith(ACTIVATIONS)}
        others = sorted(names - GATES - {"ReLU"})
        if nn.ReLU in kinds and not others:
            return
        has = f"{', '.join(others)} beside ReLU" if nn.ReLU in kinds else "no ReLU to guide"
        raise ConfigError(
            "method.localise is guided, which is defined for ReLU alone, and the student, like "
            f"{self.config.teacher.backbone}, has {has}",
            "choose method.localise=gradient or smoothgrad",
        )
