"""Classifiers that learn from labels, and from a teacher that has learnt from them before."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.distill_losses import (
    angle_relations,
    distance_relations,
    mistaken,
    softened,
    unconvinced,
)
from kdad_dist.models.backbone_classifier import (
    Classifier,
    OpenRun,
    build_classifier,
    build_known,
)
from kdad_dist.models.discriminator import TURNS, Answers, Rivals
from kdad_dist.models.dropout import drop_by
from kdad_dist.models.gather import rows_of_all
from kdad_dist.types import Batch, Features, Losses, Prediction

RELATIONS = {"rkd_distance": distance_relations, "rkd_angle": angle_relations}


class Classkd(Method):
    """A student that tells classes apart."""

    relates_images: bool
    blocks = frozenset({"BasicBlock", "Bottleneck", "Block"})

    def __init__(
        self,
        config: ClasskdConfig,
        classes: Sequence[str],
        image_size: int,
        seed: int,
        open_run: OpenRun,
        teacher: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.student = build_student(config, len(classes), image_size, seed, open_run)
        if isinstance(self.student, Rivals):
            self.parts, self.turn = TURNS, TURNS[0]
        if teacher and config.teacher is not None:
            self.teacher = build_known(config.teacher, classes, image_size, open_run)
        self.caches_targets = config.cache_teacher
        self.relates_images = config.distill in RELATIONS
        self.train()

    def forward(self, batch: Batch) -> Losses:
        """Per image, cross-entropy and what is learnt of the teacher; in eval mode, by which a
        checkpoint is chosen, cross-entropy alone, whatever is distilled.
        """
        drop_by(self.student, batch.seed)
        if self.training and self.config.distill == "discriminator":
            return self._duel(batch)
        logits = self.student(batch.image).float()
        terms = _told(logits, batch)
        entropy = terms["cross_entropy"]
        if not self.training or self.config.distill == "none":
            return {"loss": entropy, **terms}
        learnt = self._distilled(logits, self._teacher_logits(batch))
        return {"loss": self._weighted(entropy, learnt), **terms, "distillation": learnt}

    def _duel(self, batch: Batch) -> Losses:
        """The losses of the network whose turn it is."""
        said: Answers = self.student(batch.image, self._teacher_logits(batch), self.turn)
        terms = _told(said.logits.float(), batch)
        if said.on_teacher is not None:
            mistakes = mistaken(said.verdict, said.on_teacher)
            return {"loss": mistakes, **terms, "discriminator": mistakes}
        learnt = self.config.temperature**2 * unconvinced(said.verdict)
        loss = self._weighted(terms["cross_entropy"], learnt)
        return {"loss": loss, **terms, "distillation": learnt}

    def whose_turn(self, step: int) -> str:
        turns = self.config.turns
        return self.parts[-1 if step % turns.period < turns.discriminator else 0]

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """The logits; the score is the probability of the likeliest class."""
        logits = self.student(image).float()
        return Prediction(pred_score=logits.softmax(dim=1).amax(dim=1), logits=logits)

    @property
    def network(self) -> nn.Module:
        """The classifier, without the discriminator that it was trained beside."""
        return self.student.classifier if isinstance(self.student, Rivals) else self.student

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
        if self.relates_images:
            return entropy + self.config.relation_weight * learnt
        return self.config.alpha * learnt + (1 - self.config.alpha) * entropy


def build_student(
    config: ClasskdConfig, classes: int, image_size: int, seed: int, open_run: OpenRun
) -> Classifier | Rivals:
    """The classifier that is trained, where asked for with its discriminator.

    Raises:
        As `build_classifier`; ConfigError: there are too few classes for a discriminator.
    """
    network = build_classifier(config.network, classes, image_size, seed, open_run)
    if config.distill != "discriminator":
        return network
    return Rivals(network, classes, seed, config.temperature)


def _told(logits: Float[Tensor, "b k"], batch: Batch) -> Losses:
    """What is logged of a classifier in any case."""
    assert batch.label is not None
    return {
        "cross_entropy": F.cross_entropy(logits, batch.label, reduction="none"),
        "accuracy": (logits.argmax(dim=1) == batch.label).float(),
    }
