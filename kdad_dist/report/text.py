"""What scoring found, and how fast, for a terminal."""

from collections.abc import Sequence
from typing import Any

from kdad_dist.wording import aligned, amount

COLUMNS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_aupro": "AUPRO",
}
ACCURACY = {"accuracy": "accuracy"}
"""The column where classes are told apart."""
SYNTHETIC = "held-out, synthetic defects"
"""The line of held-out normal images against the same with synthetic defects."""


def scored(
    metrics: dict[str, Any], other: dict[str, Any] | None = None, doubts: Sequence[str] = ()
) -> str:
    """What scoring found, how far networks look at the same, and how fast it was.

    Args:
        metrics: of the checkpoint that `score.checkpoint` names.
        other: of the other one, where that was scored beside it.
        doubts: what to mind of all this.
    """
    step = metrics["provenance"]["checkpoint_step"]
    same = other is not None and other["provenance"]["checkpoint_step"] == step
    parts = [table(metrics, None if same else other)]
    if (limit := metrics.get("threshold")) and limit["value"] is not None:
        parts += ["", threshold(limit)]
    if metrics.get("agreement"):
        parts += ["", agreed(metrics["agreement"])]
    parts += ["", speed(metrics["provenance"])]
    if other is not None and same:
        parts.append(f"{checkpoint(other)}: the same, step {step}")
    return "\n".join([*parts, *doubts])


def checkpoint(metrics: dict[str, Any]) -> str:
    """Which checkpoint figures are of, by the words of those who chose it."""
    is_last = metrics["provenance"]["checkpoint_rule"].startswith("last")
    return f"{'last' if is_last else 'selected'} checkpoint"


def threshold(limit: dict[str, Any]) -> str:
    """The threshold of an image's score, and what it gives on the test images."""
    of = amount(limit["images"], "held-out image")
    given = rates(limit["true_positive_rate"], limit["false_positive_rate"])
    return f"threshold: {limit['value']:.4g}, from {of}{given and f': {given}'}"


def rates(found: float | None, alarms: float | None) -> str:
    """What a threshold does; "" where there is no test image."""
    parts = [] if found is None else [f"finds {found:.1%} of the defective images"]
    if alarms is not None:
        parts.append(f"raises a false alarm on {alarms:.1%} of the normal ones")
    return " and ".join(parts)


def table(metrics: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """One line per category and defect type, and the mean over several categories. Where classes
    are told apart: one per class, one of all test images, one of the held-out images. Then all
    test images by the other checkpoint, where that is given. Last, what one may choose by: held-out
    images against the same with synthetic defects.
    """
    columns = ACCURACY if "accuracy" in metrics["mean"] else COLUMNS
    rows = [["", "images", *columns.values()]]
    for name, category in metrics["categories"].items():
        rows.append(line(name, category, columns))
        kinds = category["defect_types"].items()
        rows += [line(f"  {kind}", entry, columns) for kind, entry in kinds]
    images = sum(entry["images"] for entry in metrics["categories"].values())
    if columns is ACCURACY:
        rows.append(line("all classes", {**metrics["mean"], "images": images}, columns))
        rows.append(line("held-out images", metrics["held_out"], columns))
    elif len(metrics["categories"]) > 1:
        rows.append(line("mean", metrics["mean"], columns))
    if other is not None:
        name = f"{checkpoint(other)}, step {other['provenance']['checkpoint_step']}"
        rows.append(line(name, {**other["mean"], "images": images}, columns))
    if metrics["synthetic"] is not None:
        rows.append(line(SYNTHETIC, metrics["synthetic"], columns))
    return ruled(rows)


def agreed(agreement: dict[str, dict[str, Any]]) -> str:
    """How far two networks look at the same: one line for each pair of them and kind of map."""
    columns = {"correlation": "correlation", "overlap": "overlap"}
    rows = [["agreement", "images", *columns.values()]]
    for kind, pairs in agreement.items():
        for pair, found in pairs.items():
            rows.append(line(f"{pair.replace('_', ' and ')}, {kind}", found, columns))
    return ruled(rows)


def ruled(rows: list[list[str]]) -> str:
    """A table with a line under its head."""
    lines = aligned(rows)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def speed(provenance: dict[str, Any]) -> str:
    """Images per second of the whole scoring, and how long the images of one unit took."""
    took = latency(provenance["latency_ms"])
    return f"speed: {provenance['images_per_second']:g} images/s; {took}"


def latency(figures: Any) -> str:
    """From pixels to map and score, in a sentence; anything else as it is."""
    try:
        images, median, p95 = (figures[name] for name in ("unit_images", "median", "p95"))
        together = "one image" if images == 1 else f"{images} images together"
        # Three digits, and 1180 rather than 1.18e+03.
        typical, most = (f"{float(f'{value:.3g}'):g}" for value in (median, p95))
        return f"{typical} ms for {together} (95 % within {most} ms)"
    except (LookupError, TypeError, ValueError):
        return str(figures)


def line(name: str, entry: dict[str, Any], columns: dict[str, str]) -> list[str]:
    figures = [entry[key] for key in columns]
    shown = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
    return [name, str(entry.get("images", "")), *shown]
