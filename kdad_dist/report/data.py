"""What a run directory holds, read and checked for the report.

A run may be unfinished, not scored yet, or scored on data that lack masks or defects: what is
absent is None or empty here, and the page says so in its place. What is present but damaged is
an error that names the file.
"""

import csv
import io
import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kdad_dist.config.load import config_of
from kdad_dist.errors import DataError
from kdad_dist.runtime.rundir import LOG_FILE, STATUS_FILE, results

METRICS = {
    "image_auroc": "AUROC",
    "image_ap": "AP",
    "image_f1_max": "F1 max",
    "pixel_auroc": "AUROC",
    "pixel_ap": "AP",
    "pixel_aupro": "AUPRO",
}
"""Names in the files, and in the table: three of the image, three of its pixels."""

T = TypeVar("T")


def _plain_name(name: str) -> str:
    """A file name that cannot lead out of its folder."""
    if Path(name).name != name:
        raise ValueError("is not a plain file name")
    return name


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Number = Annotated[float | None, AfterValidator(_finite)]
Label = Annotated[int | None, BeforeValidator(lambda v: None if v == "" else v)]
FileName = Annotated[str, AfterValidator(_plain_name)]
Curve = dict[str, list[float]]
LOOSE = ConfigDict(extra="ignore")


@dataclass(frozen=True, config=LOOSE)
class Figures:
    """The metrics of a category, of one defect type, or their mean; None could not be computed."""

    image_auroc: Number = None
    image_ap: Number = None
    image_f1_max: Number = None
    pixel_auroc: Number = None
    pixel_ap: Number = None
    pixel_aupro: Number = None
    accuracy: Number = None
    """Where classes are told apart: of the images of a class, or of all."""
    images: int | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """Metric -> why it is None; "masks" -> which images the pixel metrics leave out."""
    defect_types: dict[str, "Figures"] = field(default_factory=dict)


@dataclass(frozen=True, config=LOOSE)
class Threshold:
    value: Number = None
    quantile: Number = None
    images: int | None = None
    pixel_value: Number = None
    false_positive_rate: Number = None
    true_positive_rate: Number = None


@dataclass(frozen=True, config=LOOSE)
class Agreed:
    """How far the maps of two networks agree, on average over images."""

    images: int
    without: int
    """Images of which a map is constant, so that there is nothing to compare."""
    correlation: Number = None
    overlap: Number = None


@dataclass(frozen=True, config=LOOSE)
class HeldOut:
    """Of a classifier, on the held-out training images."""

    images: int
    accuracy: Number = None


@dataclass(frozen=True, config=LOOSE)
class Confusion:
    """Test images by their class and by the class that they were taken for."""

    classes: list[str]
    images: list[list[int]]


@dataclass(frozen=True, config=LOOSE)
class Metrics:
    mean: Figures
    categories: dict[str, Figures]
    threshold: Threshold | None = None
    synthetic: Figures | None = None
    """Of held-out normal images against the same with synthetic defects."""
    held_out: HeldOut | None = None
    confusion: Confusion | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, dict[str, Agreed]] = field(default_factory=dict)
    """Of what networks look at: by kind of map, then by pair of networks."""


@dataclass(frozen=True, config=LOOSE)
class Score:
    """One line of scores.csv."""

    key: str
    category: str
    defect_type: str
    gt_label: int
    pred_score: float
    pred_label: Label = None
    class_name: str | None = None
    pred_class: str | None = None
    """Where classes are told apart: its own, and the one that it was taken for."""


@dataclass(frozen=True, config=LOOSE)
class Example:
    """One test image that scoring kept with its anomaly map."""

    key: str
    category: str
    gt_label: int
    pred_score: float
    kind: str
    image: FileName
    defect_type: str | None = None
    class_name: str | None = None
    pred_class: str | None = None
    """Where classes are told apart: its own, and the one that it was taken for."""
    pred_label: Label = None
    reconstruction: FileName | None = None
    mask: FileName | None = None
    map: FileName | None = None
    map_max: float = 0.0
    """What 65535 in the map stands for."""


@dataclass(frozen=True, config=LOOSE)
class Explained:
    """One test image that scoring kept with what each network looks at."""

    key: str
    class_name: str
    image: FileName
    told: dict[str, str]
    """By network, the class that it takes the image for."""
    maps: dict[str, dict[str, FileName]]
    """By network and kind of map."""


@dataclass(frozen=True)
class RunFiles:
    """Everything that the report shows."""

    name: str
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    log: list[dict[str, Any]]
    """Lines of metrics.jsonl, the newest of each step and kind, by step."""
    unread_lines: int
    """Lines of metrics.jsonl that a kill left incomplete."""
    metrics: Metrics | None
    """Of the checkpoint that counts (`results`), as everything below."""
    other_metrics: Metrics | None
    """Of the other one, where that is scored too."""
    other_checkpoint: str
    """Which one that is: "selected" or "last"."""
    is_one_checkpoint: bool
    """Whether what was scored as the last checkpoint is the selected one, read alike."""
    scores: list[Score]
    curves: dict[str, dict[str, Curve | None]]
    examples_directory: Path
    examples: list[Example]
    explained: list[Explained]


def read_run(run: Path) -> RunFiles:
    """The files of a run directory.

    Raises:
        ConfigError: the directory is not there or holds no run.
        DataError: a file in it is damaged; the message names it.
    """
    path = config_of(run)
    config_text = _text(path)
    config = _config(path, config_text)
    log, unread = read_log(run / LOG_FILE)
    own, other = results(run)
    metrics, other_metrics = (_json(of.metrics, Metrics | None, None) for of in (own, other))
    # A checkpoint that is both is scored once, as the selected one.
    same = is_one(metrics, other_metrics)
    scores = (other if same and other.checkpoint == "best" else own).scores
    return RunFiles(
        name=str(config.get("name") or run.resolve().name),
        config_text=config_text,
        config=config,
        environment=_json(run / "environment.json", dict[str, Any], {}),
        status=_json(run / STATUS_FILE, dict[str, Any], {}),
        log=log,
        unread_lines=unread,
        metrics=metrics,
        other_metrics=other_metrics,
        other_checkpoint="selected" if other.checkpoint == "best" else "last",
        is_one_checkpoint=same,
        scores=_scores(scores / "scores.csv"),
        curves=_json(scores / "curves.json", dict[str, dict[str, Curve | None]], {}),
        examples_directory=scores / "examples",
        examples=_json(scores / "examples" / "examples.json", list[Example], []),
        explained=_json(scores / "explained" / "explained.json", list[Explained], []),
    )


def is_one(metrics: Metrics | None, other: Metrics | None) -> bool:
    """Whether both are of the same checkpoint, read alike."""
    if metrics is None or other is None:
        return False
    steps = [found.provenance.get("checkpoint_step") for found in (metrics, other)]
    return steps[0] == steps[1] and metrics.mean == other.mean


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "restore the file or its rights") from None


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}", "restore the file") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds no configuration", "restore the file")
    return config


def _json(path: Path, kind: type[T] | Any, absent: T) -> T:
    if not path.is_file():
        return absent
    try:
        return TypeAdapter(kind).validate_json(_text(path))
    except ValidationError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: ValidationError) -> DataError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return DataError(
        f"{path} is damaged{f' at {where}' if where else ''}: {first['msg']}",
        "write it again with `kdad score RUN`, or restore it",
    )


def _scores(path: Path) -> list[Score]:
    if not path.is_file():
        return []
    rows = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    try:
        return TypeAdapter(list[Score]).validate_python(rows)
    except ValidationError as error:
        raise _damaged(path, error) from None


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Newest line of each step and kind (a resumed run repeats steps), and the unreadable ones."""
    if not path.is_file():
        return [], 0
    line_type = TypeAdapter(dict[str, Any])
    lines: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    unread = 0
    for text in _text(path).splitlines():
        try:
            line = line_type.validate_json(text)
            lines[int(line["step"]), "val_loss" in line, "save_seconds" in line] = line
        except (ValidationError, KeyError, TypeError, ValueError):
            unread += 1
    return [lines[key] for key in sorted(lines)], unread
