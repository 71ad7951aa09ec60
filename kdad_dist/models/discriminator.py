"""A second network that tells a student's answers from its teacher's, and the two that compete."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError

TURNS = ("classifier", "discriminator")
SHORTEST = 10
"""Classes of which the windows of all layers leave one position."""


class Discriminator(nn.Module):
    """Convolutions along the classes, down to one number; 245 parameters for 10 classes.

    It normalises nothing: how far an answer lies from even odds, its confidence, is what tells a
    student from its teacher at last, and statistics of a batch would hide a scale that is common
    to all its answers. Each answer is judged by itself, so that it does not matter beside which.

    Raises:
        ConfigError: there are too few classes for its windows.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < SHORTEST:
            raise ConfigError(
                f"a discriminator needs {SHORTEST} classes or more, and the data has {classes}",
                "choose another method.distill, or data of more classes",
            )
        self.layers = nn.Sequential(
            *(nn.Conv1d(1, 4, 4), nn.ReLU(), nn.AvgPool1d(3, stride=1)),
            *(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.AvgPool1d(3, stride=1)),
            *(nn.Flatten(), nn.Linear(16 * (classes - SHORTEST + 1), 1)),
        )

    def forward(self, answer: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """How much each answer looks like the teacher's: the logit of its probability."""
        return self.layers(answer[:, None]).squeeze(1)


class Answers(NamedTuple):
    logits: Float[Tensor, "b k"]
    verdict: Float[Tensor, " b"]
    """On the classifier's."""
    on_teacher: Float[Tensor, " b"] | None = None
    """On the teacher's, in the discriminator's turn."""


class Rivals(nn.Module):
    """A classifier and the discriminator of its answers, as the one student that is trained.

    Args:
        seed: draws the discriminator's weights.
        temperature: by which logits are divided before answers are compared.
    """

    def __init__(self, classifier: nn.Module, classes: int, seed: int, temperature: float) -> None:
        super().__init__()
        self.classifier = classifier
        with seeded(seed, "discriminator"):
            self.discriminator = Discriminator(classes)
        self.temperature = temperature

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        target: Float[Tensor, "b k"] | None = None,
        turn: str = TURNS[0],
    ) -> Tensor | Answers:
        """The classifier's logits; beside a teacher's, with the verdicts on both.

        Each has a gradient in the network whose turn it is, and in no other.

        Args:
            target: the teacher's logits.
            turn: one of TURNS.
        """
        if target is None:
            return self.classifier(image)
        if turn == "discriminator":
            with torch.no_grad():
                logits = self.classifier(image)
            judge = self.discriminator
            return Answers(logits, judge(self._answer(logits)), judge(self._answer(target)))
        logits = self.classifier(image)
        # The gradient goes through the discriminator, not into it. Nothing of the network is
        # switched for that: sharded parameters must stay as the engine knows them.
        fixed = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        return Answers(logits, functional_call(self.discriminator, fixed, self._answer(logits)))

    def _answer(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Log-probabilities: teacher and student in the same space, of no matter what offset."""
        return F.log_softmax(logits.float() / self.temperature, dim=1)
