"""`kdad compare`: where runs differ, in configuration, figures, and the images they judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdad_dist import files
from kdad_dist.config.changes import flatten
from kdad_dist.errors import UsageError
from kdad_dist.report.classes import tells_classes
from kdad_dist.report.data import Metrics, RunFiles, Score, read_run
from kdad_dist.report.text import ACCURACY, COLUMNS
from kdad_dist.runtime.rundir import DATA_FILE
from kdad_dist.wording import kdad

OWN = ("name", "output")
"""Keys that differ from run to run and say nothing."""
FIGURES = (*COLUMNS, *ACCURACY, "correlation", "overlap")
"""Of detectors, of classifiers, and of how far two networks look at the same."""

Judged = tuple[Sequence[Score], dict[str, Any]]
"""An image as each run scored it, and how that differs."""


@dataclass(frozen=True)
class Side:
    """One of the runs."""

    directory: Path
    files: RunFiles
    trained_on: str | None
    """Fingerprint of the shards."""

    @property
    def tells_classes(self) -> bool:
        return tells_classes(self.files)

    @property
    def scored_on(self) -> str | None:
        metrics = self.files.metrics
        return None if metrics is None else metrics.provenance.get("fingerprint")

    def facts(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "name": self.files.name,
            "state": self.files.status.get("state"),
            "step": self.files.status.get("step"),
            "trained_on": self.trained_on,
            "scored_on": self.scored_on,
            "images": len(self.files.scores),
        }


def compare(runs: Sequence[Path], most: int) -> dict[str, Any]:
    """What differs between runs; lists of values are in the order of the runs.

    Args:
        most: images that are named; of detectors, of either label.

    Raises:
        UsageError: fewer than two runs, or a directory that holds none.
        DataError: a file of a run is damaged.
    """
    if len(runs) < 2:
        raise UsageError("one run alone has nothing to differ from", "name two runs or more")
    sides = [
        Side(run, read_run(run), files.read_json(run / DATA_FILE).get("fingerprint"))
        for run in runs
    ]
    return {
        "runs": [side.facts() for side in sides],
        "notes": notes(sides),
        "config": differing([side.files.config for side in sides]),
        "metrics": figures(sides),
        "images": disagreements(sides, most),
    }


def notes(sides: Sequence[Side]) -> list[str]:
    """What forbids to take figures for comparable."""
    said = []
    if len({side.tells_classes for side in sides}) > 1:
        tell, find = (
            ", ".join(str(side.directory) for side in sides if side.tells_classes is kind)
            for kind in (True, False)
        )
        said.append(
            f"classes are told apart by {tell}, anomalies are found by {find}: neither figures nor "
            "images of the one kind compare with those of the other"
        )
    for what, prints in (
        ("trained", [side.trained_on for side in sides]),
        ("scored", [side.scored_on for side in sides]),
    ):
        if len(set(prints) - {None}) > 1:
            named = [f"{s.directory} on {p[:8]}" for s, p in zip(sides, prints, strict=True) if p]
            so = ": the figures are not of the same images" if what == "scored" else ""
            said.append(f"{what} on different data ({', '.join(named)}){so}")
    known = [side for side in sides if side.files.scores]
    keys = [{(score.category, score.key) for score in side.files.scores} for side in known]
    if any(other != keys[0] for other in keys):
        counts = [f"{s.directory} {len(k)}" for s, k in zip(known, keys, strict=True)]
        common = len(set.intersection(*keys))
        said.append(f"scored other images ({', '.join(counts)}), of which {common} are the same")
    unscored = [side for side in sides if side.files.metrics is None]
    said += [f"{s.directory} is not scored yet: {kdad('score', s.directory)}" for s in unscored]
    return said


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys of which not all runs have the same value; null where one has no such key."""
    flat = [dict(flatten(config)) for config in configs]
    found = {}
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [values.get(key) for values in flat]
        if key not in OWN and any(value != values[0] for value in values):
            found[key] = values
    return found


def figures(sides: Sequence[Side]) -> dict[str, dict[str, list[float | None]]]:
    """By part of a run's results: each figure that one of the runs has, of every run."""
    several = [parts(side.files.metrics) if side.files.metrics else {} for side in sides]
    found = {}
    for part in dict.fromkeys(part for run in several for part in run):
        rows = {key: [getattr(run.get(part), key, None) for run in several] for key in FIGURES}
        found[part] = {k: v for k, v in rows.items() if any(x is not None for x in v)}
    return found


def parts(metrics: Metrics) -> dict[str, Any]:
    """What a run has figures of: each category, their mean (of classes: all images), held-out
    images, and networks of which it says how far they agree.
    """
    return {
        "mean": metrics.mean,
        **{f"category {name}": found for name, found in metrics.categories.items()},
        "synthetic": metrics.synthetic,
        "held_out": metrics.held_out,
        **{
            f"agreement {kind}, {pair}": found
            for kind, pairs in metrics.agreement.items()
            for pair, found in pairs.items()
        },
    }


def disagreements(sides: Sequence[Side], most: int) -> dict[str, list[dict[str, Any]]]:
    """The images that runs judge most differently, the worst first: of detectors those that are
    "normal" and "anomalous", of classifiers "classes"; {} of both kinds of runs together.
    """
    kinds = {side.tells_classes for side in sides}
    if len(kinds) > 1:
        return {}
    tables = [{(s.category, s.key): s for s in side.files.scores} for side in sides]
    common = [place for place in tables[0] if all(place in table for table in tables)]
    rows = [[table[place] for table in tables] for place in common]
    pictures = [{(e.category, e.key): e.image for e in side.files.examples} for side in sides]

    def described(scores: Sequence[Score], differing: dict[str, Any]) -> dict[str, Any]:
        one = scores[0]
        return {
            **{name: getattr(one, name) for name in ("key", "category", "defect_type", "gt_label")},
            "scores": [score.pred_score for score in scores],
            "labels": [score.pred_label for score in scores],
            **differing,
            "of": len(rows),
            "pictures": [
                str(side.files.examples_directory / known[one.category, one.key])
                if (one.category, one.key) in known
                else None
                for side, known in zip(sides, pictures, strict=True)
            ],
        }

    judged = by_class(rows) if True in kinds else by_rank(rows)
    return {kind: [described(*image) for image in some[:most]] for kind, some in judged.items()}


def by_class(rows: Sequence[Sequence[Score]]) -> dict[str, list[Judged]]:
    """The images that are not taken for the same class by all runs.

    First come those of which the runs are surest: the sum of their confidences is largest.
    """
    apart = [row for row in rows if len({score.pred_class for score in row}) > 1]
    apart.sort(key=lambda row: -sum(score.pred_score for score in row))
    return {
        "classes": [
            (
                row,
                {
                    "class_name": row[0].class_name,
                    "told": [score.pred_class for score in row],
                    "differing": len(apart),
                },
            )
            for row in apart
        ]
    }


def by_rank(rows: Sequence[Sequence[Score]]) -> dict[str, list[Judged]]:
    """The images of either label whose rank is not the same in all runs, the furthest apart first.

    The scores of two runs have no common scale; their order has. Rank 1 is the most anomalous of
    the images that all runs have scored.
    """
    ranks = np.array(
        [ranked([score.pred_score for score in run]) for run in zip(*rows, strict=True)]
    )
    apart = np.ptp(ranks, axis=0) if rows else np.zeros(0)
    order = [int(i) for i in np.argsort(-apart, kind="stable") if apart[i]]
    return {
        name: [
            (rows[i], {"ranks": ranks[:, i].tolist(), "apart": float(apart[i])})
            for i in order
            if rows[i][0].gt_label == label
        ]
        for name, label in (("normal", 0), ("anomalous", 1))
    }


def ranked(scores: Sequence[float]) -> NDArray[np.float64]:
    """Rank of each score from the largest, 1, down; equal ones share the mean of theirs."""
    _, place, count = np.unique(-np.array(scores), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
