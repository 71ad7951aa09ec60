"""The tensors that travel between data, methods, training and scoring."""

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int64
from torch import Tensor

Losses = dict[str, Float[Tensor, " b"]]
"""One value per image: `"loss"` is what is minimised, further entries are logged terms of it.

Losses are per image, not averaged, because only the trainer knows how many images the *global*
batch holds: it divides the sum by that number. A short batch, a rank without rows and gradient
accumulation are then all weighted exactly, on any number of processes.
"""

Features = tuple[Float[Tensor, "b _c _h _w"], ...]
"""Feature maps of the chosen layers, shallow to deep."""


class Poll(Protocol):
    """Called between two pieces of long work, and while others do it."""

    def __call__(self, done: int = 0) -> None:
        """Raises if the work is to be left.

        Args:
            done: pieces since the last call.
        """


def go_on(done: int = 0) -> None:
    """The `Poll` of work that is never left."""


@dataclass(frozen=True)
class Batch:
    """The rows of one process in one micro-batch, on the device. May hold no image at all."""

    image: Float[Tensor, "b 3 h w"]
    """RGB in [0, 1], not normalised (a method knows the statistics of its teacher)."""
    row: Int64[Tensor, " b"]
    """Position of each image in the list of training samples."""
    seed: Int64[Tensor, " b"]
    """Of each image in this epoch: whatever is drawn for it (a mask) is drawn from this."""
    targets: Features | None = None
    """The teacher's features, where they were computed once and cached."""
    label: Int64[Tensor, " b"] | None = None
    """Place of each image's class in `data.classes`, for methods that tell classes apart."""


@dataclass(frozen=True)
class Prediction:
    """What a method says of a batch of images. A part that a method cannot give is None."""

    anomaly_map: Float[Tensor, "b h w"] | None = None
    """At input resolution, float32, >= 0, higher is more anomalous, not smoothed."""
    pred_score: Float[Tensor, " b"] | None = None
    """Per image, for methods without a map; otherwise the map is reduced by `score.reduce`."""
    logits: Float[Tensor, "b k"] | None = None
    reconstruction: Float[Tensor, "b 3 h w"] | None = None
    """The image as the method believes it should be, RGB in [0, 1]."""
