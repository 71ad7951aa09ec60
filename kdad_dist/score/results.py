"""From the parts of a scoring to its results: what all of them add up to."""

import csv
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.metrics.image import rates
from kdad_dist.provenance import Timing
from kdad_dist.score.parts import TEST, VAL, Row, Stored

log = logging.getLogger(__name__)
COLUMNS = ("key", "category", "defect_type", "gt_label", "pred_score", "pred_label")
ENOUGH = 20
"""Held-out images below which a quantile of their scores says little of others."""


class Results(NamedTuple):
    metrics: dict[str, Any]
    """The content of `metrics.json`, without provenance."""
    tested: list[Row]
    """One of each test image, in the order of the test set."""
    timings: list[Timing]


def results(config: RunConfig, partial: Path, parts: Iterable[Stored]) -> Results:
    """What all parts of a scoring add up to; writes `scores.csv` and `curves.json`."""
    test, synthetic = Evaluation(), Evaluation()
    rows: list[Row] = []
    timings: list[Timing] = []
    for part in parts:  # in memory one at a time
        test.merge(part.test)
        synthetic.merge(part.synthetic)
        rows += part.rows
        timings += part.timings
    rows.sort(key=lambda r: r["order"])
    limit = threshold(config, [r for r in rows if r["kind"] == VAL])
    metrics = {
        **test.report(limit["value"]),
        "threshold": limit | rates_at(limit["value"], test),
        "synthetic": synthetic.report()["mean"] if config.score.synthetic else None,
    }
    tested = [r for r in rows if r["kind"] == TEST]
    for r in tested:
        r["pred_label"] = None if limit["value"] is None else int(r["pred_score"] > limit["value"])
    warn_of_unseen_defects(tested, config.data.centre_margin)
    write_scores(partial / "scores.csv", tested)
    files.write_json(partial / "curves.json", test.curves())
    return Results(metrics, tested, timings)


def threshold(config: RunConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """The quantile of held-out normal images' scores, and of the maxima of their maps.

    The quantile is the next larger score that occurs, so that at least that share lies below.
    """
    quantile = config.score.threshold_quantile
    if 0 < len(rows) < ENOUGH:
        log.warning(
            "the threshold rests on %s only, so it is not firm: expect false alarms or missed "
            "defects; more training images, or a larger data.val_fraction, make it firmer",
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


def warn_of_unseen_defects(tested: Sequence[Row], margin: int) -> None:
    """Says of how many defective images nothing that is defective is in the window."""
    defective = [r for r in tested if r["gt_label"] and r["mask_empty"] is not None]
    if margin and (unseen := sum(r["mask_empty"] for r in defective)):
        log.warning(
            "%d of %d defective test images have no defect inside the window that is judged "
            "(data.centre_margin=%d): they still count as defective, none of their pixels does",
            unseen,
            len(defective),
            margin,
        )


def warn_of_replaced(file: Path, before: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Says that results which were read otherwise are replaced, and by which words they came.

    Args:
        before: what the file held, {} where it was not there.
    """
    made = before.get("provenance")
    if not isinstance(made, dict):
        return
    old, new = (str(m.get("readout")).split(", ") for m in (made, metrics["provenance"]))
    gone = [part for part in old if part not in new]
    gone += ["synthetic True"] if before.get("synthetic") and not metrics["synthetic"] else []
    came = [part for part in new if part not in old]
    if gone or came:
        how = f"with {', '.join(gone)}" if gone else f"without {', '.join(came)}"
        page = file.parent / "report.html"
        left = f"; {page} still shows them" if page.is_file() else ""
        log.warning("%s: replaces results that were read %s%s", file, how, left)


def rates_at(limit: float | None, test: Evaluation) -> dict[str, float | None]:
    """The rates that a threshold gives on the test set; unknown where there is no threshold."""
    if limit is None:
        return {"false_positive_rate": None, "true_positive_rate": None}
    return rates(*test.labels_and_scores(), limit)


def write_scores(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """The table of the test images."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
