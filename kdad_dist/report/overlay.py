"""Charts of several runs at once: their curves over one another, their figures side by side."""

from collections.abc import Sequence
from typing import NamedTuple

from kdad_dist.report.charts import (
    Chart,
    Mark,
    Point,
    Scale,
    axis,
    curve,
    fitted,
    frame,
    shortened,
)

HUES = 8
"""Colours of the style sheet; what comes after them is dashed."""


class Compared(NamedTuple):
    """One line of a chart of figures."""

    name: str
    value: float | None
    deviation: float | None
    published: float | None


def hue(number: int) -> str:
    """Classes of the style sheet for the so-manieth of several lines."""
    return f"hue{number % HUES} dash{min(number // HUES, 2)}"


def overlaid(
    title: str, y_label: str, lines: Sequence[tuple[str, Sequence[Sequence[Point]]]]
) -> Chart | None:
    """Curves over steps, several of one name in one colour; None where there is nothing to draw."""
    points = [point for _, part in lines for points in part for point in points]
    values = [y for _, y in points if y is not None]
    if not values:
        return None
    width, height = 560, 340
    x = Scale(0, max(1, *(x for x, _ in points)), 64, width - 16)
    y = fitted(values, height - 62, 34, wide=20)
    marks = frame(x, y, "step", y_label + (" (log)" if y.log else ""))
    told, legend = [], []
    for i, (name, part) in enumerate(lines):
        known = [[b for _, b in points if b is not None] for points in part]
        lowest = [min(values) for values in known if values]
        if not lowest:
            continue
        legend.append((hue(i), name))
        told.append(f"{name}: lowest {min(lowest):.3g}.")
        marks += [
            curve(points, hue(i), x, y)
            for points, values in zip(part, known, strict=True)
            if values
        ]
    return Chart(title, " ".join(told), width, height, legend, marks)


def figures_chart(title: str, rows: Sequence[Compared]) -> Chart | None:
    """A dot for each figure, with its deviation, and a ring for what is published."""
    values = [
        value
        for row in rows
        for value in (
            row.published,
            *(() if row.value is None else around(row.value, row.deviation)),
        )
        if value is not None
    ]
    if not values:
        return None
    height, width = 24, 560
    bottom = 12 + height * len(rows)
    x = fitted(values, 190, width - 16, wide=1e9)
    marks = axis(x, 6, bottom, title)
    told, legend = [], [("dot", "this sweep")]
    for i, row in enumerate(rows):
        at = 12 + height * i + height / 2
        label = shortened(row.name, 20)
        marks.append(Mark("text", {"class": "tick end", "x": 180, "y": at + 5}, label))
        if row.value is not None:
            low, high = around(row.value, row.deviation)
            marks.append(Mark("path", {"class": "line hue0", "d": f"M{x(low)} {at}H{x(high)}"}))
            marks.append(
                Mark("circle", {"class": "point dot", "cx": x(row.value), "cy": at, "r": 5})
            )
            told.append(f"{row.name}: {row.value:.4f}.")
        if row.published is not None:
            place = {"cx": x(row.published), "cy": at, "r": 5}
            marks.append(Mark("circle", {"class": "point ring", **place}))
    if any(row.published is not None for row in rows):
        legend.append(("ring", "published"))
    return Chart(title, " ".join(told), width, bottom + 54, legend, marks)


def around(value: float, deviation: float | None) -> tuple[float, float]:
    return value - (deviation or 0), value + (deviation or 0)
