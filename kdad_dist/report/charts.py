"""The report's charts: geometry computed here, drawn as inline SVG by the template.

A chart is a list of marks, plain SVG elements. The template writes them and escapes every
attribute and text, so names that come from data need no care here. Colours, strokes and font
sizes are classes of the style sheet, which knows dark mode and phones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kdad_dist.metrics.curves import PRO_LIMIT
from kdad_dist.wording import amount

Point = tuple[float, float | None]
MAX_POINTS = 400
"""Points of a line, and dots of a row: more cannot be told apart."""


class Mark(NamedTuple):
    tag: str
    attributes: dict[str, str | float]
    text: str = ""


@dataclass(frozen=True)
class Chart:
    title: str
    description: str
    """What a reader who cannot see the chart should know."""
    width: int
    height: int
    legend: list[tuple[str, str]]
    """Class of the style sheet, and text, of each kind of mark."""
    marks: list[Mark] = field(repr=False)


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to coordinates in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / (high - low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values inside the range: about five, or the decades of a logarithmic scale."""
        if self.log:
            exponents = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            factors = (1,) if self.high / self.low > 1e3 else (1, 3)
            values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        else:
            raw = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            values = [round(i * step, 12) for i in range(first, last + 1)]
        return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def fitted(values: Sequence[float], start: float, end: float, wide: float) -> Scale:
    """A scale around the values; logarithmic where they are positive and span over `wide` times."""
    low, high = min(values), max(values)
    if low > 0 and high / low > wide:
        return Scale(low / 1.1, high * 1.1, start, end, log=True)
    margin = (high - low or abs(high) or 1.0) * 0.04
    return Scale(0.0 if 0 <= low < high / 2 else low - margin, high + margin, start, end)


def loss_chart(
    train: Sequence[Point], held_out: Sequence[Point], scored_step: int | None
) -> Chart | None:
    """Loss over steps on training and held-out images; None where there is nothing to draw."""
    values = [y for _, y in [*train, *held_out] if y is not None]
    if not values:
        return None
    steps = [x for x, _ in [*train, *held_out]]
    width, height = 560, 340
    x = Scale(min(0, *steps), max(1, *steps), 64, width - 16)
    y = fitted(values, height - 62, 34, wide=20)
    marks = [*frame(x, y, "step", "loss per image" + (" (log)" if y.log else ""))]
    if scored_step is not None and scored_step <= x.high:
        label = f"scored: step {scored_step}"
        marks += upright(x(scored_step), y.start, y.end, y.end + 16, "checkpoint", label)
    marks.append(curve(train, "first", x, y))
    marks.append(Mark("path", {"class": "line second", "d": path(thinned(held_out), x, y)}))
    marks += [
        Mark("circle", {"class": "point second", "cx": x(a), "cy": y(b), "r": 3})
        for a, b in (held_out if len(held_out) <= 60 else ())
        if b is not None
    ]
    told = [
        f"{name}: from {line[0]:.3g} to {line[-1]:.3g}, lowest {min(line):.3g}."
        for name, points in (("Training", train), ("Held-out", held_out))
        if (line := [b for _, b in points if b is not None])
    ]
    legend = [("first", "training images")]
    if held_out:
        legend.append(("second", "held-out images"))
    return Chart("Loss during training", " ".join(told), width, height, legend, marks)


def score_chart(
    groups: Sequence[tuple[str, bool, Sequence[float]]], threshold: float | None
) -> Chart:
    """Histogram of normal and defective scores over one row of dots per defect type.

    Args:
        groups: name, whether defective, and scores of each row; at least one score in all.
    """
    width, row, top = 560, 32, 30
    floor = top + max(120, 300 - row * len(groups))
    bottom = floor + row * len(groups) + 14
    everything = [score for _, _, scores in groups for score in scores]
    marked = everything if threshold is None else [*everything, threshold]
    x = fitted(marked, 16, width - 16, wide=30)
    marks = [*axis(x, top, bottom, "score of an image" + (" (log)" if x.log else ""))]
    marks += areas(groups, x, floor, top)
    marks.append(Mark("path", {"class": "axis", "d": f"M{x.start} {floor}H{x.end}"}))
    for i, (name, defective, scores) in enumerate(groups):
        kind, base = ("defect" if defective else "normal"), floor + 6 + row * i
        spread = dots(scores, x, base + 20, base + 31)
        marks.append(Mark("path", {"class": f"dots {kind}", "d": spread}))
        label = f"{shortened(name)} ({len(scores)})"
        marks.append(Mark("text", {"class": f"row {kind}", "x": x.start, "y": base + 15}, label))
    told = [
        f"{name}: {amount(len(s), 'image')}, median {np.median(s):.3g}, "
        f"from {min(s):.3g} to {max(s):.3g}."
        for name, _, s in groups
    ]
    if threshold is not None:
        label = f"threshold {threshold:.3g}"
        marks += upright(x(threshold), bottom, top - 24, top - 12, "threshold", label)
        told.append(f"The threshold is {threshold:.3g}.")
    kinds = {defective for _, defective, _ in groups}
    named = {False: ("normal", "normal images"), True: ("defect", "defective images")}
    legend = [named[defective] for defective in sorted(kinds)]
    title = "Scores of normal and defective images"
    return Chart(title, " ".join(told), width, bottom + 54, legend, marks)


def areas(
    groups: Sequence[tuple[str, bool, Sequence[float]]], x: Scale, floor: float, top: float
) -> list[Mark]:
    """One histogram of the normal and one of the defective scores, as shares of their images."""
    shares = {}
    for kind, wanted in (("normal", False), ("defect", True)):
        scores = [score for _, defective, part in groups if defective == wanted for score in part]
        if scores:
            shares[kind] = histogram(scores, x)
    y = Scale(0, max(map(max, shares.values())), floor, top)
    return [
        Mark("path", {"class": f"area {kind}", "d": steps_path(share, x, y)})
        for kind, share in shares.items()
    ]


def roc_chart(
    curves: Sequence[tuple[str, Sequence[Point], float | None]], at: tuple[float, float] | None
) -> Chart:
    """True against false positive rate.

    Args:
        curves: name, points and area of each.
        at: the rates at the decision threshold, for images.
    """
    x, y = Scale(0, 1, 52, 386), Scale(0, 1, 338, 34)
    marks = [*frame(x, y, "false positive rate", "true positive rate")]
    marks.append(Mark("path", {"class": "chance", "d": f"M{x(0)} {y(0)}L{x(1)} {y(1)}"}))
    told, legend = [], []
    for i, (name, points, area) in enumerate(curves):
        kind = ("first", "second")[i % 2]
        marks.append(Mark("path", {"class": f"line {kind}", "d": path(points, x, y)}))
        legend.append((kind, _with_area(name, area)))
        told.append(f"Area under the curve of {_with_area(name, area)}.")
    if at is not None:
        legend.append(("at", "threshold"))
        marks.append(Mark("circle", {"class": "point at", "cx": x(at[0]), "cy": y(at[1]), "r": 6}))
        told.append(f"At the threshold: {at[1]:.1%} of defective images found, {at[0]:.1%} of")
        told.append("normal images called anomalous.")
    return Chart("ROC curves", " ".join(told), 400, 400, legend, marks)


def pro_chart(points: Sequence[tuple[float, float]], area: float | None) -> Chart:
    """Per-region overlap against the false positive rate, up to where AUPRO integrates.

    Args:
        points: at least one, by rising false positive rate.
    """
    x, y = Scale(0, PRO_LIMIT, 52, 386), Scale(0, 1, 338, 34)
    rates, overlaps = [point[0] for point in points], [point[1] for point in points]
    drawn: list[Point] = [point for point in points if point[0] < PRO_LIMIT]
    if rates[-1] >= PRO_LIMIT:
        drawn.append((PRO_LIMIT, float(np.interp(PRO_LIMIT, rates, overlaps))))
    line = path(drawn, x, y)
    marks = [*frame(x, y, "false positive rate of pixels", "per-region overlap")]
    closed = f"{line}L{x(drawn[-1][0])} {y(0)}L{x(drawn[0][0])} {y(0)}Z"
    marks.append(Mark("path", {"class": "under first", "d": closed}))
    marks.append(Mark("path", {"class": "line first", "d": line}))
    told = f"{_with_area('AUPRO', area)}, to a false positive rate of {PRO_LIMIT}."
    legend = [("first", _with_area("pixels", area))]
    return Chart("PRO curve", told, 400, 400, legend, marks)


def _with_area(name: str, area: float | None) -> str:
    return name if area is None else f"{name} {area:.3f}"


def shortened(name: str, length: int = 40) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def histogram(scores: Sequence[float], x: Scale, bins: int = 40) -> list[float]:
    """Share of the scores in each of equally wide bins of the drawn axis."""
    at = [(x(score) - x.start) / (x.end - x.start) for score in scores]
    counts, _ = np.histogram(at, bins=bins, range=(0, 1))
    return (counts / len(scores)).tolist()


def steps_path(shares: Sequence[float], x: Scale, y: Scale) -> str:
    bin_width = (x.end - x.start) / len(shares)
    d = f"M{x.start} {y(0)}"
    for i, share in enumerate(shares):
        d += f"V{y(share)}H{round(x.start + (i + 1) * bin_width, 1)}"
    return d + f"V{y(0)}Z"


def dots(scores: Sequence[float], x: Scale, top: float, bottom: float) -> str:
    """Lines of no length, which round caps turn into dots, spread over the row's height."""
    ordered = sorted(scores)
    if len(ordered) > MAX_POINTS:
        chosen = np.linspace(0, len(ordered) - 1, MAX_POINTS).round().astype(int)
        ordered = [ordered[i] for i in chosen]
    golden = (math.sqrt(5) - 1) / 2  # neighbours land far apart
    heights = [top + (i * golden % 1) * (bottom - top) for i in range(len(ordered))]
    return "".join(f"M{x(s)} {h:.1f}h0" for s, h in zip(ordered, heights, strict=True))


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """A line through the points, broken where a value is None; a lone point becomes a dot."""
    d, joined = "", False
    for a, b in points:
        if b is not None:
            d += f"L{x(a)} {y(b)}" if joined else f"M{x(a)} {y(b)}h0"
        joined = b is not None
    return d


def curve(points: Sequence[Point], kind: str, x: Scale, y: Scale) -> Mark:
    """A line, or a dot that can be seen where it would be of one point."""
    known = [(a, b) for a, b in points if b is not None]
    if len(known) != 1:
        return Mark("path", {"class": f"line {kind}", "d": path(thinned(points), x, y)})
    [(a, b)] = known
    return Mark("circle", {"class": f"point {kind}", "cx": x(a), "cy": y(b), "r": 4})


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points: means over neighbours. A part that holds no value is a gap."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    means = []
    for part in parts:
        values = [b for _, b in part if b is not None]
        means.append((part[-1][0], sum(values) / len(values) if values else None))
    return means


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Mark]:
    """Axes with grid lines, ticks and labels."""
    marks = []
    for value in y.ticks():
        at = y(value)
        marks.append(Mark("path", {"class": "grid", "d": f"M{x.start} {at}H{x.end}"}))
        attributes = {"class": "tick end", "x": x.start - 8, "y": at + 5}
        marks.append(Mark("text", attributes, f"{value:g}"))
    marks.append(Mark("text", {"class": "label", "x": 4, "y": 16}, y_label))
    return marks + axis(x, y.end, y.start, x_label)


def axis(x: Scale, top: float, bottom: float, label: str) -> list[Mark]:
    marks = []
    for value in x.ticks():
        at = x(value)
        marks.append(Mark("path", {"class": "grid", "d": f"M{at} {top}V{bottom}"}))
        marks.append(
            Mark("text", {"class": "tick middle", "x": at, "y": bottom + 20}, f"{value:g}")
        )
    marks.append(Mark("path", {"class": "axis", "d": f"M{x.start} {bottom}H{x.end}"}))
    middle = (x.start + x.end) / 2
    marks.append(Mark("text", {"class": "label middle", "x": middle, "y": bottom + 46}, label))
    return marks


def upright(
    at: float, bottom: float, top: float, label_y: float, kind: str, label: str
) -> list[Mark]:
    """A vertical line with its label on the side that has more room."""
    line = Mark("path", {"class": kind, "d": f"M{at} {bottom}V{top}"})
    place: dict[str, str | float] = {"class": f"label {kind}", "x": at + 7, "y": label_y}
    if at > 300:
        place |= {"class": f"label {kind} end", "x": at - 7}
    return [line, Mark("text", place, label)]
