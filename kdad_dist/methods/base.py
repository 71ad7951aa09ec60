"""What a method is: a student that learns what normal looks like, and how to read its mistakes."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.types import Batch, Features, Losses, Prediction


class Method(nn.Module, ABC):
    """A trainable student beside a frozen teacher.

    A method never sees optimizer, accelerator or rank, and a step only in `whose_turn`. It always
    calls `self.student(...)`, which the trainer may have wrapped (DDP) or compiled.
    """

    student: nn.Module
    """The only part that is wrapped, optimised and saved."""
    teacher: nn.Module | None
    """Frozen, in eval mode, never wrapped, never saved."""
    derived: frozenset[str] = frozenset()
    """Names of frozen weights of the student that follow from other weights and the configuration,
    but for their last bits, which another processor may round otherwise."""
    parts: tuple[str, ...] = ("",)
    """The student's modules that are trained in turns, each by an optimizer of its own; "" is the
    whole student. In the turn of one, the losses have no gradient in the others."""
    turn: str = ""
    """The part that is trained now."""
    blocks: frozenset[str] = frozenset()
    """Class names of the student's modules that sharded training gathers one at a time."""
    relates_images: bool = False
    """Whether the loss of an image looks at the others of its batch, so that a batch cannot be
    taken in several passes."""
    wants_images: int = 0
    """Training images that `prepare` looks at."""
    caches_targets: bool
    """Whether `targets` of all images shall be computed once, before training."""

    def __init__(self) -> None:
        super().__init__()
        # Not a default in the class: it would hide the module that torch keeps elsewhere.
        self.teacher = None
        self.caches_targets = False

    @abstractmethod
    def forward(self, batch: Batch) -> Losses:
        """The losses of each image; `"loss"` is the one that is minimised."""

    @abstractmethod
    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        """Anomaly maps and scores of RGB images in [0, 1]."""

    @property
    def network(self) -> nn.Module:
        """What is left of the student where it is not trained any more, unwrapped."""
        return self.student

    def prepare(self, image: Float[Tensor, "b 3 h w"]) -> None:
        """Looks at the first training images before a training begins; what it learns of them
        belongs into buffers of the student, which checkpoints hold.
        """

    def whose_turn(self, step: int) -> str:
        """The part that a step (from 0) trains; it depends on nothing else, so that who resumes
        goes on in the middle of a turn.
        """
        return self.parts[0]

    def targets(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        """What the teacher says of the images; the trainer may cache it as `Batch.targets`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no teacher whose output can be cached"
        )

    def train(self, mode: bool = True) -> "Method":
        """Switches the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self
