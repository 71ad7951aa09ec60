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
from kdad_dist.report.data import METRICS, Figures, RunFiles, Score, read_run
from kdad_dist.runtime.rundir import DATA_FILE
from kdad_dist.wording import kdad

OWN = ("name", "output")
"""Keys that differ from run to run and say nothing."""


@dataclass(frozen=True)
class Side:
    """One of the runs."""

    directory: Path
    files: RunFiles
    trained_on: str | None
    """Fingerprint of the shards."""

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
        most: images of either label that are named.

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
    """By category, and "mean" and "synthetic" (of held-out images) of a run: each figure that one
    of the runs has, of every run.
    """
    scored = [side.files.metrics for side in sides]
    parts: dict[str, list[Figures | None]] = {"mean": [m.mean if m else None for m in scored]}
    for name in dict.fromkeys(name for m in scored if m for name in m.categories):
        parts[f"category {name}"] = [m.categories.get(name) if m else None for m in scored]
    parts["synthetic"] = [m.synthetic if m else None for m in scored]
    found = {}
    for part, several in parts.items():
        rows = {key: [getattr(f, key, None) for f in several] for key in METRICS}
        found[part] = {k: v for k, v in rows.items() if any(x is not None for x in v)}
    return found


def disagreements(sides: Sequence[Side], most: int) -> dict[str, list[dict[str, Any]]]:
    """The images whose rank differs most between runs, the worst first: "normal", "anomalous".

    The scores of two runs have no common scale; their order has. Rank 1 is the most anomalous of
    the images that all runs have scored.
    """
    tables = [{(s.category, s.key): s for s in side.files.scores} for side in sides]
    if not all(tables):
        return {"normal": [], "anomalous": []}
    common = [place for place in tables[0] if all(place in table for table in tables)]
    ranks = np.array([ranked([table[p].pred_score for p in common]) for table in tables])
    apart = np.ptp(ranks, axis=0) if common else np.zeros(0)
    pictures = [{(e.category, e.key): e.image for e in side.files.examples} for side in sides]

    def described(i: int) -> dict[str, Any]:
        place = common[i]
        return {
            **named(tables[0][place]),
            "scores": [table[place].pred_score for table in tables],
            "labels": [table[place].pred_label for table in tables],
            "ranks": ranks[:, i].tolist(),
            "apart": float(apart[i]),
            "of": len(common),
            "pictures": [
                str(side.files.examples_directory / known[place]) if place in known else None
                for side, known in zip(sides, pictures, strict=True)
            ],
        }

    order = sorted(range(len(common)), key=lambda i: -apart[i])
    labelled = {"normal": 0, "anomalous": 1}
    return {
        name: [
            described(i)
            for i in [i for i in order if tables[0][common[i]].gt_label == label and apart[i]][
                :most
            ]
        ]
        for name, label in labelled.items()
    }


def named(score: Score) -> dict[str, Any]:
    names = ("key", "category", "defect_type", "gt_label")
    return {name: getattr(score, name) for name in names}


def ranked(scores: Sequence[float]) -> NDArray[np.float64]:
    """Rank of each score from the largest, 1, down; equal ones share the mean of theirs."""
    _, place, count = np.unique(-np.array(scores), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
