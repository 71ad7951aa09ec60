"""What the makers of exports agree on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTPUTS = (
    *("pred_score", "anomaly_map", "reconstruction"),
    *("logits", "probabilities", "pred_label"),
)
"""Of a graph, in this order: those that the method gives, named as in `Predictions`."""
Outputs = dict[str, NDArray[Any]]
"""By these names."""
Runner = Callable[[NDArray[np.uint8]], Outputs]
"""Judges RGB images (b, s, s, 3)."""


@dataclass(frozen=True)
class Made:
    """A file that has been checked and is not yet written."""

    name: str
    content: bytes
    facts: dict[str, Any]
    """For the manifest."""


def reason(error: BaseException) -> str:
    """The first line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]
