"""Charts of the report as PNG files, drawn by Pillow: no browser, no further library."""

import itertools
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kdad_dist import files
from kdad_dist.report.charts import Chart, Mark
from kdad_dist.runtime.progress import progress

FIGURES = "figures"
SCALE = 3
"""Pixels for each unit of a chart."""
FINE = 2
"""Times as large is what is drawn at first: made smaller, it has smooth edges."""
HEAD, MARGIN = 28, 8
"""Units above a chart for each row of its legend, and to its left, and below a chart."""
TEXT, MUTED, GRID, PAGE = "#191d23", "#55606d", "#e7eaef", "#ffffff"
ACCENT, DEFECT, SECOND = "#0b5cad", "#b34700", "#7a3fb0"
COLOURS = {
    **{"grid": GRID, "axis": MUTED, "chance": MUTED, "tick": MUTED, "label": MUTED},
    **{"first": ACCENT, "second": SECOND, "normal": ACCENT, "defect": DEFECT, "dot": ACCENT},
    **{"threshold": TEXT, "checkpoint": TEXT, "at": TEXT, "ring": DEFECT},
    **{"hue0": ACCENT, "hue1": DEFECT, "hue2": "#14693a", "hue3": SECOND, "hue4": "#b3261e"},
    **{"hue5": "#00707f", "hue6": "#7d6200", "hue7": "#b52b74"},
}
"""Those of the style sheet, by day."""
DASHES = {"second": 7, "dash1": 7, "dash2": 2, "chance": 3, "threshold": 5, "checkpoint": 5}
FILLED = ("area", "under")
Points = list[tuple[float, float]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_pngs(charts: Mapping[str, Chart], folder: Path) -> None:
    """One file for each chart, of its name."""
    folder.mkdir(exist_ok=True)
    with progress("drawing", len(charts), "figures", brief=True) as bar:
        for name, chart in charts.items():
            buffer = BytesIO()
            drawn(chart).save(buffer, "PNG")
            files.write_bytes(folder / f"{name}.png", buffer.getvalue())
            bar.advance()


def drawn(chart: Chart) -> Image.Image:
    """The chart below its legend."""
    font = ImageFont.load_default(15 * SCALE * FINE)
    legend = placed(chart, font)
    head = HEAD * (1 + max((row for row, *_ in legend), default=-1))
    width, height = chart.width * SCALE, (chart.height + head + MARGIN) * SCALE
    canvas = Image.new("RGB", (width * FINE, height * FINE), PAGE)
    pen = Pen(ImageDraw.Draw(canvas, "RGBA"), font, head)
    for row, left, kind, text in legend:
        y = HEAD * (row + 0.5) - head
        pen.line([(left, y), (left + 18, y)], colour(kind), 3, dash(kind))
        pen.text(left + 24, y + 5, text, TEXT, "ls")
    for mark in chart.marks:
        pen.mark(mark)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def placed(chart: Chart, font: Font) -> list[tuple[int, float, str, str]]:
    """Row, left edge, class and text of each entry of the legend."""
    row, left, entries = 0, float(MARGIN), []
    for kind, text in chart.legend:
        wide = 40 + font.getlength(text) / (SCALE * FINE)
        if left > MARGIN and left + wide > chart.width:
            row, left = row + 1, MARGIN
        entries.append((row, left, kind, text))
        left += wide
    return entries


def colour(kind: str) -> str:
    return next((COLOURS[word] for word in reversed(kind.split()) if word in COLOURS), TEXT)


def dash(kind: str) -> int | None:
    return next((DASHES[word] for word in kind.split() if word in DASHES), None)


class Pen:
    """Draws marks, whose unit is that of the chart."""

    def __init__(self, canvas: ImageDraw.ImageDraw, font: Font, top: float) -> None:
        self.canvas, self.font, self.top = canvas, font, top

    def at(self, x: float, y: float) -> tuple[float, float]:
        return x * SCALE * FINE, (y + self.top) * SCALE * FINE

    def text(self, x: float, y: float, text: str, fill: str, anchor: str) -> None:
        self.canvas.text(self.at(x, y), text, fill, self.font, anchor)

    def mark(self, mark: Mark) -> None:
        kind = str(mark.attributes.get("class", ""))
        if mark.tag == "text":
            x, y = place(mark.attributes, "x", "y")
            anchor = "rs" if "end" in kind.split() else "ms" if "middle" in kind.split() else "ls"
            self.text(x, y, mark.text, colour(kind), anchor)
        elif mark.tag == "circle":
            self.circle(mark, kind)
        else:
            for points in strokes(str(mark.attributes["d"])):
                self.stroke(points, kind)

    def circle(self, mark: Mark, kind: str) -> None:
        x, y = place(mark.attributes, "cx", "cy")
        r = float(mark.attributes["r"])
        hollow = {"ring", "at"} & set(kind.split())
        box = (*self.at(x - r, y - r), *self.at(x + r, y + r))
        fill, width = PAGE if hollow else colour(kind), 2 * SCALE * FINE
        self.canvas.ellipse(box, fill, colour(kind), width if hollow else 0)

    def stroke(self, points: Points, kind: str) -> None:
        words = set(kind.split())
        if "dots" in words:
            [(x, y), *_] = points
            box = (*self.at(x - 2, y - 2), *self.at(x + 2, y + 2))
            self.canvas.ellipse(box, colour(kind) + "80")
            return
        if words & set(FILLED):
            self.canvas.polygon([self.at(*point) for point in points], colour(kind) + "30")
        width = 2.25 if "line" in words else 1.5 if words - {"grid", "axis"} else 1
        self.line(points, colour(kind), width, dash(kind))

    def line(self, points: Points, ink: str, width: float, dashes: int | None) -> None:
        wide = round(width * SCALE * FINE)
        for part in [points] if dashes is None else dashed(points, dashes):
            self.canvas.line([self.at(*point) for point in part], ink, wide, "curve")


def place(attributes: Mapping[str, str | float], x: str, y: str) -> tuple[float, float]:
    return float(attributes[x]), float(attributes[y])


def strokes(d: str) -> Iterator[Points]:
    """The connected lines of a path: M, L, H, V, h and Z, which is all that charts use."""
    points: Points = []
    for command, words in re.findall(r"([MLHVhZ])([^MLHVhZ]*)", d):
        numbers = [float(word) for word in words.split()]
        x, y = points[-1] if points else (0.0, 0.0)
        match command:
            case "M":
                if points:
                    yield points
                points = [(numbers[0], numbers[1])]
            case "L":
                points.append((numbers[0], numbers[1]))
            case "H":
                points.append((numbers[0], y))
            case "V":
                points.append((x, numbers[0]))
            case "h":
                points.append((x + numbers[0], y))
            case _:
                points.append(points[0])
    if points:
        yield points


def dashed(points: Points, length: int) -> Iterator[Points]:
    """Every other piece of this length along a line."""
    along, pieces = 0.0, {}
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        far = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        count = max(1, round(far))
        for i in range(count + 1):
            share = i / count
            piece = int((along + far * share) // length)
            if piece % 2 == 0:
                point = (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)
                pieces.setdefault(piece, []).append(point)
        along += far
    yield from (piece for piece in pieces.values() if len(piece) > 1)
