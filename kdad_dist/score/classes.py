"""From the parts of a scoring to its results where classes are told apart: how many are right."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import KdadError
from kdad_dist.metrics.tally import METRICS
from kdad_dist.provenance import Timing
from kdad_dist.score.parts import TEST, VAL, Row, Stored
from kdad_dist.score.results import COLUMNS, Results, write_scores

NO_ANOMALIES = "classes are told apart: nothing is anomalous"
CLASS_COLUMNS = (*COLUMNS, "class_name", "pred_class")
PICTURES = 40
"""Mistakes that are kept to look at, about as many of each class."""


def results(config: RunConfig, partial: Path, parts: Iterable[Stored]) -> Results:
    """What all parts of a scoring add up to; writes `scores.csv`."""
    classes = config.data.classes
    assert classes is not None
    rows: list[Row] = []
    timings: list[Timing] = []
    for part in parts:
        rows += part.rows
        timings += part.timings
    rows.sort(key=lambda row: row["order"])
    for row in rows:
        if not math.isfinite(row["pred_score"]):
            raise KdadError(
                f"The logits of image {row['key']} are not finite",
                "score a checkpoint whose weights are finite",
            )
        row["pred_class"] = classes[row["pred_label"]]
    tested, held_out = ([r for r in rows if r["kind"] == kind] for kind in (TEST, VAL))
    write_scores(partial / "scores.csv", tested, CLASS_COLUMNS)
    return Results(measured(classes, tested, held_out), tested, timings)


def measured(
    classes: Sequence[str], tested: Sequence[Row], held_out: Sequence[Row]
) -> dict[str, Any]:
    """The content of `metrics.json`, without provenance.

    The accuracy under `mean` is that of all test images together.
    """
    nothing = dict.fromkeys(METRICS)
    notes = dict.fromkeys(METRICS, NO_ANOMALIES)
    categories = {}
    for label, name in enumerate(classes):
        own = [row for row in tested if row["gt_label"] == label]
        why = {} if own else {"accuracy": "no test image is of this class"}
        categories[name] = {
            "accuracy": accuracy(own),
            **nothing,
            "images": len(own),
            "defect_types": {},
            "notes": {**why, **notes},
        }
    pairs = Counter((row["gt_label"], row["pred_label"]) for row in tested)
    places = range(len(classes))
    return {
        "mean": {"accuracy": accuracy(tested), **nothing},
        "categories": categories,
        "held_out": {"accuracy": accuracy(held_out), "images": len(held_out)},
        "confusion": {
            "classes": list(classes),
            "images": [[pairs[label, said] for said in places] for label in places],
        },
        "threshold": None,
        "synthetic": None,
    }


def accuracy(rows: Sequence[Row]) -> float | None:
    """The share that is right; None of none."""
    return sum(r["gt_label"] == r["pred_label"] for r in rows) / len(rows) if rows else None


def mistakes(rows: Sequence[Row]) -> Iterator[Row]:
    """Images taken for another class, those of each class by turns, the surest mistakes first."""
    wrong = [row for row in rows if row["gt_label"] != row["pred_label"]]
    wrong.sort(key=lambda row: (-row["pred_score"], row["key"]))
    rank: Counter[int] = Counter()
    turns = []
    for row in wrong:
        turns.append((rank[row["gt_label"]], row["gt_label"], row))
        rank[row["gt_label"]] += 1
    turns.sort(key=lambda turn: turn[:2])
    chosen = [row for *_, row in turns[:PICTURES]]
    yield from sorted(chosen, key=lambda row: (row["gt_label"], -row["pred_score"], row["key"]))


def write_mistakes(
    folder: Path, rows: Sequence[Row], load: Callable[[str], NDArray[np.uint8]]
) -> None:
    """Writes some images that were taken for another class, and `examples.json` that lists them."""
    folder.mkdir()
    entries = []
    for number, row in enumerate(mistakes(rows)):
        name = f"{number:04d}_image.png"
        Image.fromarray(load(row["key"])).save(folder / name)
        entries.append(
            {key: row[key] for key in CLASS_COLUMNS} | {"kind": "mistake", "image": name}
        )
    files.write_json(folder / "examples.json", entries)
