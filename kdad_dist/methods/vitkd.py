"""Distillation of a vision transformer's tokens into a shallow one."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdad_dist.config.methods import VitkdConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.feature_loss import Terms, terms
from kdad_dist.methods.stfpm import distance, enlarge
from kdad_dist.models.backbone_vit import build_timm_tokens
from kdad_dist.models.dropout import drop_by
from kdad_dist.models.hf import build_hub_tokens
from kdad_dist.models.tokens import IMAGENET, PLAIN, TokenNet, Tokens
from kdad_dist.models.vit_student import build_vit_student
from kdad_dist.types import Batch, Features, Losses, Prediction

COLOURS = {"teacher": None, "imagenet": IMAGENET, "none": PLAIN}


class Vitkd(Method):
    """A student whose blocks learn the tokens of chosen layers of the teacher on normal images."""

    blocks = frozenset({"Block"})

    def __init__(self, config: VitkdConfig, image_size: int, seed: int) -> None:
        super().__init__()
        self.config = config
        build = build_hub_tokens if config.teacher.of_hub else build_timm_tokens
        colours = COLOURS[config.normalize]
        teacher = build(config.teacher, image_size, seed, colours).eval().requires_grad_(False)
        self.teacher: TokenNet = teacher  # pyright: ignore[reportIncompatibleVariableOverride]
        depth = len(config.teacher.layers)
        self.student = build_vit_student(teacher.form, depth, config.student, seed)
        self.caches_targets = config.cache_teacher
        self.train()

    def forward(self, batch: Batch) -> Losses:
        """Per image, both distances summed over the layers, and their weighted sum."""
        drop_by(self.student, batch.seed)
        if batch.targets is not None:
            targets = tuple(tokens[..., 0].transpose(1, 2) for tokens in batch.targets)
        else:
            targets = self._teacher_tokens(batch.image)
        found = terms(targets, self._student_tokens(batch.image))
        return {"loss": self._weighted(found), **found._asdict()}

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """The loss on the layers that are read; of each patch 1 - cosine, summed over them."""
        trios = zip(
            self.config.teacher.layers,
            self._teacher_tokens(image),
            self._student_tokens(image),
            strict=True,
        )
        pairs = [(t, s) for layer, t, s in trios if layer in self.config.read]
        targets, features = zip(*pairs, strict=True)
        maps = [distance(self._map(t), self._map(s)) / 2 for t, s in pairs]
        anomaly_map = enlarge(torch.stack(maps).sum(dim=0), *image.shape[-2:])
        return Prediction(anomaly_map, self._weighted(terms(targets, features)))

    def targets(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        """The tokens as maps one pixel wide, (b, width, tokens, 1)."""
        return tuple(t.transpose(1, 2)[..., None] for t in self._teacher_tokens(image))

    def _weighted(self, found: Terms) -> Float[Tensor, " b"]:
        value, direction = self.config.value_weight, self.config.direction_weight
        return value * found.value + direction * found.direction

    @torch.no_grad()
    def _teacher_tokens(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        return self.teacher(image)

    def _student_tokens(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        return self.student((image - self.teacher.mean) / self.teacher.std)

    def _map(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b width grid grid"]:
        """The patches' tokens where the patches are."""
        form = self.teacher.form
        return tokens[:, form.prefix :].transpose(1, 2).unflatten(2, (form.grid, form.grid))
