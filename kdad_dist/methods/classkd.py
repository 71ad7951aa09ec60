"""Classifiers that learn from labels, and from a teacher that has learnt from them before."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdad_dist.config_classkd import ClasskdConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.distill_losses import angle_relations, distance_relations, softened
from kdad_dist.models.backbone_classifier import (
    OpenRun,
    build_class_teacher,
    build_classifier,
)
from kdad_dist.models.gather import rows_of_all
from kdad_dist.types import Batch, Features, Losses, Prediction

RELATIONS = {"rkd_distance": distance_relations, "rkd_angle": angle_relations}


class Classkd(Method):
    """A student that tells classes apart."""

    tells_classes = True
    relates_images: bool
    blocks = frozenset({"BasicBlock", "Bottleneck", "Block"})

    def __init__(
        self,
        config: ClasskdConfig,
        classes: Sequence[str],
        image_size: int,
        seed: int,
        open_run: OpenRun,
    ) -> None:
        super().__init__()
        self.config = config
        self.student = build_classifier(config.network, len(classes), image_size, seed, open_run)
        if config.teacher is not None:
            self.teacher = build_class_teacher(config.teacher, classes, image_size, open_run)
        self.caches_targets = config.cache_teacher
        self.relates_images = config.distill in RELATIONS
        self.train()

    def forward(self, batch: Batch) -> Losses:
        """Per image, cross-entropy and what is learnt of the teacher; in eval mode, by which a
        checkpoint is chosen, cross-entropy alone, whatever is distilled.
        """
        assert batch.label is not None
        logits = self.student(batch.image).float()
        entropy = F.cross_entropy(logits, batch.label, reduction="none")
        terms = {
            "cross_entropy": entropy,
            "accuracy": (logits.argmax(dim=1) == batch.label).float(),
        }
        if not self.training or self.config.distill == "none":
            return {"loss": entropy, **terms}
        learnt = self._distilled(logits, self._teacher_logits(batch))
        return {"loss": self._weighted(entropy, learnt), **terms, "distillation": learnt}

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """The logits; the score is the probability of the likeliest class."""
        logits = self.student(image).float()
        return Prediction(pred_score=logits.softmax(dim=1).amax(dim=1), logits=logits)

    def targets(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        """The teacher's logits as maps of one pixel, (b, k, 1, 1)."""
        assert self.teacher is not None
        with torch.no_grad():
            return (self.teacher(image)[..., None, None],)

    def _teacher_logits(self, batch: Batch) -> Float[Tensor, "b k"]:
        [logits] = self.targets(batch.image) if batch.targets is None else batch.targets
        return logits[..., 0, 0].float()

    def _distilled(
        self, student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"]
    ) -> Float[Tensor, " b"]:
        if self.config.distill == "hinton":
            return softened(student, teacher, self.config.temperature)
        relations = RELATIONS[self.config.distill]
        return relations(rows_of_all(student), rows_of_all(teacher))

    def _weighted(
        self, entropy: Float[Tensor, " b"], learnt: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        if self.config.distill == "hinton":
            return self.config.alpha * learnt + (1 - self.config.alpha) * entropy
        return entropy + self.config.relation_weight * learnt
