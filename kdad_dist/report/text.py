"""What scoring found, and how fast, for a terminal."""

from typing import Any

from kdad_dist.wording import aligned

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


def table(metrics: dict[str, Any]) -> str:
    """One line per category and defect type, and the mean over several categories. Where classes
    are told apart: one per class, one of all test images, one of the held-out images. Last, what
    one may choose by: held-out images against the same with synthetic defects.
    """
    columns = ACCURACY if "accuracy" in metrics["mean"] else COLUMNS
    rows = [["", "images", *columns.values()]]
    for name, category in metrics["categories"].items():
        rows.append(line(name, category, columns))
        kinds = category["defect_types"].items()
        rows += [line(f"  {kind}", entry, columns) for kind, entry in kinds]
    if columns is ACCURACY:
        images = sum(entry["images"] for entry in metrics["categories"].values())
        rows.append(line("all classes", {**metrics["mean"], "images": images}, columns))
        rows.append(line("held-out images", metrics["held_out"], columns))
    elif len(metrics["categories"]) > 1:
        rows.append(line("mean", metrics["mean"], columns))
    if metrics["synthetic"] is not None:
        rows.append(line(SYNTHETIC, metrics["synthetic"], columns))
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
