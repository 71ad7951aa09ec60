"""The report's tables and figures: what stands in them, and how numbers are written."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from kdad_dist import wording
from kdad_dist.report import text
from kdad_dist.report.data import METRICS, Figures, Metrics, RunFiles, Score, Threshold
from kdad_dist.report.text import SYNTHETIC

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Row:
    """A line of the table of metrics: a mean, a category, or a defect type of one."""

    name: str
    level: int
    images: int | None
    cells: list[tuple[str, float | None, int | None]]
    """Metric, value, and the number of the note that says why there is none."""
    note: int | None
    """Number of a note on the whole line."""


@dataclass(frozen=True)
class Decision:
    """How many images of one kind lie above the threshold."""

    category: str
    name: str
    defective: bool
    images: int
    called: int


def figure(value: Any) -> str:
    """A number as people read it; a dash for None; anything else as it is."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return figure(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else wording.duration(seconds)


def moment(text: Any) -> str:
    """An ISO 8601 time to the minute, in UTC; anything else as it is."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text)
    return f"{time.astimezone(UTC) if time.tzinfo else time:%Y-%m-%d %H:%M} UTC"


def rates(threshold: Threshold) -> str:
    """What the threshold gives on the test images, in a sentence."""
    given = text.rates(threshold.true_positive_rate, threshold.false_positive_rate)
    return f"It {given}." if given else ""


def headline(files: RunFiles) -> list[tuple[str, str, str]]:
    """The few figures to see first: value, name, explanation."""
    if files.metrics is None:
        return []
    mean, threshold = files.metrics.mean, files.metrics.threshold or Threshold()
    return [
        (_three(mean.image_auroc), "Image AUROC", "telling defective from normal images"),
        (_three(mean.pixel_auroc), "Pixel AUROC", "telling defective from normal pixels"),
        (_three(mean.pixel_aupro), "Pixel AUPRO", "covering every defect, small or large"),
        (
            percent(threshold.true_positive_rate),
            "Defects found",
            "defective images above the threshold",
        ),
        (
            percent(threshold.false_positive_rate),
            "False alarms",
            "normal images above the threshold",
        ),
    ]


def _three(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def table(files: RunFiles) -> tuple[list[Row], list[str]]:
    """Rows of the table of metrics, and the notes that its dashes refer to."""
    if files.metrics is None:
        return [], []
    notes: list[str] = []
    rows = []
    for category, figures in files.metrics.categories.items():
        rows.append(_row(category, 1, figures, notes))
        rows += [_row(name, 2, part, notes) for name, part in figures.defect_types.items()]
    if len(files.metrics.categories) != 1:
        rows.insert(0, _row("mean", 0, _mean(files.metrics), notes))
    if files.other_metrics is not None and not files.is_one_checkpoint:
        step = files.other_metrics.provenance.get("checkpoint_step", "?")
        name = f"mean of the {files.other_checkpoint} checkpoint, step {step}"
        rows.append(_row(name, 0, _mean(files.other_metrics), notes))
    if files.metrics.synthetic is not None:
        rows.append(_row(SYNTHETIC, 0, files.metrics.synthetic, notes))
    return rows, notes


def _mean(metrics: Metrics) -> Figures:
    """The mean over the categories, with the images of all of them."""
    images = sum(figures.images or 0 for figures in metrics.categories.values())
    return replace(metrics.mean, images=images)


def _row(name: str, level: int, figures: Figures, notes: list[str]) -> Row:
    """A line of the table; reasons that no earlier line had are added to the notes."""

    def noted(reason: str) -> int:
        if reason not in notes:
            notes.append(reason)
        return notes.index(reason) + 1

    cells = []
    for metric in METRICS:
        value = getattr(figures, metric)
        default = "not known for any category" if level == 0 else "not computed"
        note = noted(figures.notes.get(metric, default)) if value is None else None
        cells.append((metric, value, note))
    masks = figures.notes.get("masks")
    return Row(name, level, figures.images, cells, noted(masks) if masks else None)


def decisions(scores: list[Score]) -> list[Decision]:
    """Images called anomalous, per category and kind; empty where scoring had no threshold."""
    images: Counter[tuple[str, bool, str]] = Counter()
    called: Counter[tuple[str, bool, str]] = Counter()
    for score in scores:
        if score.pred_label is None:
            return []
        kind = (score.category, bool(score.gt_label), kind_of(score))
        images[kind] += 1
        called[kind] += score.pred_label
    return [Decision(c, name, bad, images[c, bad, name], called[c, bad, name])
            for c, bad, name in sorted(images)]  # fmt: skip


def kind_of(score: Score) -> str:
    return (score.defect_type or "defective") if score.gt_label else "normal"


def curve(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float | None]]:
    """A figure over the steps of a log, without the turns of another network than the student."""
    told = [line for line in lines if key in line and "discriminator" not in line]
    return [(line["step"], number(line[key])) for line in told]


def number(value: Any) -> float | None:
    finite = isinstance(value, int | float) and abs(value) < float("inf")
    return float(value) if finite else None


def training_facts(files: RunFiles) -> list[tuple[str, str]]:
    """Name and value of what to know about the training."""
    status, log = files.status, files.log
    facts = [("State", figure(status.get("state"))), ("Why", status.get("reason"))]
    if "step" in status:
        of = f" of {status['steps']}" if status.get("steps") else ""
        facts.append(("Steps", f"{status['step']}{of}"))
    trained = [line for line in log if "loss" in line]
    if trained:
        last = trained[-1]
        facts.append(("Epochs", figure(number(last.get("epoch")))))
        facts.append(("Images seen", figure(last.get("samples_seen"))))
        facts.append(("Last loss", figure(number(last.get("loss")))))
    held_out = [
        (v, line["step"]) for line in log if (v := number(line.get("val_loss"))) is not None
    ]
    if held_out:
        best, step = min(held_out)
        facts.append(("Lowest held-out loss", f"{figure(best)} at step {step}"))
    speed = [v for line in trained if (v := number(line.get("images_per_second")))]
    if speed:
        facts.append(("Images per second", f"{figure(statistics.median(speed))} (median)"))
    return [(name, value) for name, value in facts if value and value != DASH]
