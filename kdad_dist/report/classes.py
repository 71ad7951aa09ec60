"""What the report shows of a run that tells classes apart."""

from dataclasses import dataclass

from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.report.data import Confusion, Example, Metrics, RunFiles
from kdad_dist.report.pictures import Panels, panels
from kdad_dist.report.tables import DASH, percent

TEMPLATE = "report_classes.html.j2"


@dataclass(frozen=True)
class Cell:
    """Images of one class that were taken for one class."""

    images: int
    share: float
    """Of the images of the class."""
    right: bool


@dataclass(frozen=True)
class Line:
    """A class: how many of its test images are right, and what they were taken for."""

    name: str
    images: int
    accuracy: float | None
    mistaken: str
    """The class that it is most often taken for."""
    cells: list[Cell]


@dataclass(frozen=True)
class Mistake:
    example: Example
    panels: Panels


@dataclass(frozen=True)
class Classes:
    lines: list[Line]
    """Of every class, in the order of the labels; none where the run is not scored."""
    images: int
    accuracy: float | None
    """Of all test images."""
    other_accuracy: float | None
    """The same of the checkpoint that does not count, where both were scored."""
    held_out: tuple[int, float | None]
    """Images, and their accuracy."""
    mistakes: list[tuple[str, list[Mistake]]]
    """By class."""


def tells_classes(files: RunFiles) -> bool:
    return (files.config.get("method") or {}).get("name") == ClasskdConfig.name


def classes(files: RunFiles) -> Classes:
    """The figures of the classes and the images that were taken for another one."""
    found, other = files.metrics, files.other_metrics
    if found is None or found.confusion is None:
        return Classes([], 0, None, None, (0, None), [])
    lines = [_line(found, found.confusion, place) for place in range(len(found.confusion.classes))]
    wrong: dict[str, list[Mistake]] = {}
    for example in files.examples:
        shown = Mistake(example, panels(example, files.examples_directory, 1.0))
        wrong.setdefault(example.class_name or "", []).append(shown)
    held_out = found.held_out
    return Classes(
        lines,
        sum(line.images for line in lines),
        found.mean.accuracy,
        other.mean.accuracy if other and not files.is_one_checkpoint else None,
        (held_out.images, held_out.accuracy) if held_out else (0, None),
        list(wrong.items()),
    )


def _line(found: Metrics, confusion: Confusion, place: int) -> Line:
    name, counts = confusion.classes[place], confusion.images[place]
    total = sum(counts)
    others = [(count, other) for other, count in enumerate(counts) if other != place and count]
    mistaken = DASH
    if others:
        count, other = max(others, key=lambda pair: (pair[0], -pair[1]))
        mistaken = f"{confusion.classes[other]} ({count})"
    cells = [Cell(n, n / total if total else 0.0, other == place) for other, n in enumerate(counts)]
    return Line(name, total, found.categories[name].accuracy, mistaken, cells)


def headline(shown: Classes) -> list[tuple[str, str, str]]:
    """The few figures to see first: value, name, explanation."""
    known = [(line.accuracy, line.name) for line in shown.lines if line.accuracy is not None]
    if not known:
        return []
    (lowest, hardest), (highest, easiest) = min(known), max(known)
    images, held_out = shown.held_out
    wrong = sum(cell.images for line in shown.lines for cell in line.cells if not cell.right)
    return [
        (percent(shown.accuracy), "Accuracy", f"of {shown.images} test images"),
        (percent(held_out), "Held-out accuracy", f"of {images} held-out training images"),
        (percent(lowest), "Hardest class", hardest),
        (percent(highest), "Easiest class", easiest),
        (str(wrong), "Mistakes", "test images taken for another class"),
    ]
