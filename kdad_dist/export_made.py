"""What the makers of exports agree on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTPUTS = ("pred_score", "anomaly_map")
"""Of a graph, in this order; the second where the method gives maps."""
Outputs = dict[str, NDArray[np.float32]]
"""By these names: (b,) and (b, s, s)."""
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
