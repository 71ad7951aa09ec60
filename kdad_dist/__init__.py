"""Train, score and report visual anomaly detectors on any number of GPUs.

Example:
    from kdad_dist import load

    detector = load("runs/tile")
    result = detector.predict(["new.png"])
    print(result.pred_score, result.pred_label)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdad_dist.detector import Detector, Predictions, load

__all__ = ["Detector", "Predictions", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs torch, which takes seconds to import, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdad_dist import detector

    return getattr(detector, name)
