"""From scored images to results: what a process keeps of its share, and what all add up to."""

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdad_dist import files
from kdad_dist.config import RunConfig
from kdad_dist.data.index import Sample
from kdad_dist.detector_facts import Timing
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.metrics.image import rates

log = logging.getLogger(__name__)
VAL, SYNTHETIC, TEST = "val", "synthetic", "test"
ENOUGH = 20
"""Held-out images below which a quantile of their scores says little of others."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """One image's outcome."""

    kind: str
    sample: Sample
    pred_score: float
    anomaly_map: NDArray[np.float32] | None
    reconstruction: NDArray[np.uint8] | None
    gt_mask: NDArray[np.bool_] | None


class ScoredUnit(NamedTuple):
    images: list[Scored]
    seconds: float
    """From decoded pixels to maps and scores."""


class Share:
    """What one process found: counts, rows and times, no map and no picture."""

    def __init__(self, config: RunConfig) -> None:
        self.test = Evaluation()
        self.synthetic = Evaluation()
        self.compares = config.score.synthetic
        self.rows: list[Row] = []
        self.timings: list[Timing] = []

    def add(self, number: int, unit: ScoredUnit) -> None:
        self.timings.append(Timing(len(unit.images), unit.seconds))
        for place, image in enumerate(unit.images):
            self.measure(image)
            self.rows.append({"order": [number, place], **row(image)})

    def measure(self, image: Scored) -> None:
        """Held-out images count only where they are compared with synthetic defects."""
        sample, measured = image.sample, (image.pred_score, image.anomaly_map, image.gt_mask)
        if image.kind == TEST:
            assert sample.gt_label is not None
            where = (sample.key, sample.category, sample.defect_type, sample.gt_label)
            self.test.update(*where, *measured)
        elif self.compares and image.kind == VAL:
            self.synthetic.update(sample.key, sample.category, None, 0, *measured)
        elif self.compares:
            key = f"{sample.key} (defect)"
            self.synthetic.update(key, sample.category, SYNTHETIC, 1, *measured)

    def save(self, partial: Path, rank: int) -> None:
        name = f"rank_{rank:05d}"
        self.test.save(partial / f"{name}_test.npz")
        self.synthetic.save(partial / f"{name}_synthetic.npz")
        part = {"rows": self.rows, "timings": self.timings}
        files.write_json(partial / f"{name}_rows.json", part)


class Results(NamedTuple):
    metrics: dict[str, Any]
    """The content of `metrics.json`, without provenance."""
    tested: list[Row]
    """One of each test image, in the order of the test set."""
    timings: list[Timing]


def row(image: Scored) -> Row:
    sample, anomaly_map = image.sample, image.anomaly_map
    return {
        "kind": image.kind,
        "key": sample.key,
        "category": sample.category,
        "defect_type": sample.defect_type,
        "gt_label": sample.gt_label,
        "pred_score": image.pred_score,
        "map_max": None if anomaly_map is None else float(anomaly_map.max()),
    }


def results(config: RunConfig, partial: Path) -> Results:
    """What the shares of all processes add up to; writes `scores.csv` and `curves.json`."""
    parts = [json.loads(file.read_bytes()) for file in sorted(partial.glob("*_rows.json"))]
    rows = sorted((r for part in parts for r in part["rows"]), key=lambda r: r["order"])
    test, synthetic = merged(partial, "test"), merged(partial, "synthetic")
    for file in partial.glob("rank_*"):
        file.unlink()
    limit = threshold(config, [r for r in rows if r["kind"] == VAL])
    metrics = {
        **test.report(limit["value"]),
        "threshold": limit | rates_at(limit["value"], test),
        "synthetic": synthetic.report()["mean"] if config.score.synthetic else None,
    }
    tested = [r for r in rows if r["kind"] == TEST]
    for r in tested:
        r["pred_label"] = None if limit["value"] is None else int(r["pred_score"] > limit["value"])
    write_scores(partial / "scores.csv", tested)
    files.write_json(partial / "curves.json", test.curves())
    return Results(metrics, tested, [Timing(*t) for part in parts for t in part["timings"]])


def merged(partial: Path, name: str) -> Evaluation:
    evaluation = Evaluation()
    for file in sorted(partial.glob(f"rank_*_{name}.npz")):
        evaluation.merge(Evaluation.load(file))
    return evaluation


def threshold(config: RunConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """The quantile of held-out normal images' scores, and of the maxima of their maps.

    The quantile is the next larger score that occurs, so that at least that share lies below.
    """
    quantile = config.score.threshold_quantile
    if 0 < len(rows) < ENOUGH:
        log.warning(
            "the threshold rests on %s only: expect false alarms; more training "
            "images, or a larger data.val_fraction, make it firmer",
            "one held-out image" if len(rows) == 1 else f"{len(rows)} held-out images",
        )

    def of(name: str) -> float | None:
        values = [r[name] for r in rows if r[name] is not None]
        return float(np.quantile(values, quantile, method="higher")) if values else None

    return {
        "value": of("pred_score"),
        "quantile": quantile,
        "images": len(rows),
        "pixel_value": of("map_max"),
    }


def rates_at(limit: float | None, test: Evaluation) -> dict[str, float | None]:
    """The rates that a threshold gives on the test set; unknown where there is no threshold."""
    if limit is None:
        return {"false_positive_rate": None, "true_positive_rate": None}
    return rates(*test.labels_and_scores(), limit)


def write_scores(path: Path, rows: Sequence[Row]) -> None:
    columns = ["key", "category", "defect_type", "gt_label", "pred_score", "pred_label"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
