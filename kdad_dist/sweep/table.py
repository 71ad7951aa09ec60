"""The figures of a sweep: every class or variant over its seeds, beside what is published."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

from kdad_dist import files
from kdad_dist.sweep.jobs import KINDS, SCORED, Job, Sweep
from kdad_dist.sweep.published import METRICS
from kdad_dist.sweep.text import Table, as_csv, as_markdown, first, mean_of

Found = Mapping[str, Mapping[tuple[str, int], Table]]
"""By kind, then by class (or variant) and seed: mean figures of a run."""
MISSING = ("category", "seed", "state", "reason")
FILE = "table.json"
NEUTRAL = {"name", "output", "checkpoint", "track"}
"""Sections of a configuration that change no figure."""
PUBLISHED = "pretrained"
NETWORKS = {"teacher": "teacher's", "network": "network's first"}
"""Sections of `method` with weights that others have published, and whose they are."""


def write_table(sweep: Sweep) -> Table:
    """Writes `table.json`, `table.csv` and `table.md` of the runs as they are now.

    Raises:
        DataError: the directory cannot be written.
    """
    found = table(sweep)
    with files.writing(sweep.directory):
        sweep.directory.mkdir(parents=True, exist_ok=True)
        files.write_json(sweep.directory / FILE, found)
        files.write_text(sweep.directory / "table.csv", as_csv(found))
        files.write_text(sweep.directory / "table.md", as_markdown(found))
    return found


def table(sweep: Sweep) -> Table:
    """The content of `table.json`.

    `categories` (the classes or variants) hold for each figure its `mean` and sample `deviation`
    over seeds (null of one seed): `selected` of the checkpoint that was selected, `final` of the
    last one, and first in line of the one that `score.checkpoint` names; `published` by method, and
    the `difference` to the first; `cautions` are what to mind of that, each with the classes that
    it is about. `mean` holds the same of the classes; its deviation is that of the mean over
    classes, from seed to seed, and its `published` and `difference` are of the `compared` classes.
    """
    runs = [entry(job) for job in sweep.jobs]
    own = "selected" if sweep.base.score.checkpoint == "best" else "final"
    found = {
        kind: {(run["category"], run["seed"]): run[kind] for run in runs if run[kind]}
        for kind in KINDS
    }
    seeds = sorted({run["seed"] for run in runs})
    categories = {
        name: {
            "seeds": sum((name, seed) in found[own] for seed in seeds),
            **{key: row(sweep, found, own, name, seeds, key) for key in METRICS},
        }
        for name in sweep.names
    }
    means = {key: mean(sweep, found, own, categories, seeds, key) for key in METRICS}
    count = sum(part["seeds"] > 0 for part in categories.values())
    return {
        "name": sweep.base.name,
        "rows": sweep.rows,
        "typed": list(sweep.typed),
        "tells_classes": sweep.base.tells_classes,
        "complete": all(run["state"] == SCORED for run in runs),
        "seeds": sweep.seeds,
        "checkpoint": own,
        "rules": {kind: rules(runs, kind) for kind in KINDS},
        "categories": categories,
        # Of methods side by side, a mean says nothing.
        "mean": {"categories": count, **means} if sweep.rows == "class" else None,
        "cautions": cautions(sweep),
        "published": {
            method: {
                name: {key: asdict(figure) for key, figure in figures[name].items()}
                for name in sweep.names
                if name in figures
            }
            for method, figures in sweep.published.items()
        },
        "missing": [{k: run[k] for k in MISSING} for run in runs if run["state"] != SCORED],
        "runs": runs,
    }


def cautions(sweep: Sweep) -> dict[str, list[str]]:
    """What to mind when runs are compared with what is published: sentences, and the classes (or
    variants) that each is about.
    """
    said: dict[str, list[str]] = {}
    typed = [word for word in sweep.typed if word.split("=")[0].split(".")[0] not in NEUTRAL]
    shards = [word for word in typed if word.startswith("data.shards=")]
    typed = [word for word in typed if word not in shards]
    published = [n for n in sweep.names if any(n in theirs for theirs in sweep.published.values())]
    if shards and published:
        said[
            f"What is published is matched by name alone: whether {shards[-1]} holds the data set "
            "that it is of, nobody has checked."
        ] = published
    if typed and published:
        said[
            f"Set otherwise than in the configuration: {', '.join(typed)}. What is published "
            "knows nothing of it: mind the differences."
        ] = published
    for section, whose in NETWORKS.items():
        others: dict[str, list[str]] = {}
        for job in sweep.jobs:
            if (weights := own_weights(job, section)) is not None:
                names = others.setdefault(weights, [])
                names += [job.name] * (job.name not in names)
        for weights, names in others.items():
            said[f"The {whose} weights are {weights} in: {', '.join(names)}."] = names
    return said


def own_weights(job: Job, section: str) -> str | None:
    """The weights that a network of a run starts from, where they are neither those that are
    published of it nor another run of the sweep.
    """
    weights = getattr(getattr(job.config.method, section, None), "weights", PUBLISHED)
    is_of_sweep = any(Path(weights).is_relative_to(need.run) for need in job.needs)
    return None if weights == PUBLISHED or is_of_sweep else weights


def entry(job: Job) -> Table:
    """One run: where it is, how far, and its figures (null where there are none)."""
    figures = job.figures()
    return {
        "category": job.name,
        "seed": job.config.seed,
        "directory": str(job.run),
        "needs": [need.run.name for need in job.needs],
        "state": job.state(),
        "reason": job.reason(),
        **{kind: figures[kind]["mean"] if kind in figures else None for kind in KINDS},
        "provenance": {kind: figures[kind].get("provenance", {}) for kind in figures},
    }


def rules(runs: Sequence[Table], kind: str) -> list[str]:
    """How the checkpoints of this kind were chosen, in the words of the runs."""
    told = {run["provenance"].get(kind, {}).get("checkpoint_rule") for run in runs}
    return sorted(rule for rule in told if rule)


def row(sweep: Sweep, found: Found, own: str, name: str, seeds: Sequence[int], key: str) -> Table:
    """One figure of one class."""
    parts = {
        kind: spread([found[kind].get((name, seed), {}).get(key) for seed in seeds])
        for kind in KINDS
    }
    theirs = by_method(sweep, name, key)
    ours, reference = parts[own]["mean"], first(theirs)
    return {
        **parts[own],
        **parts,
        "published": theirs,
        "difference": None if ours is None or reference is None else ours - reference,
    }


def by_method(sweep: Sweep, name: str, key: str) -> dict[str, float | None]:
    """What is published of one figure of one class: of each method that has it of some class."""
    return {
        method: figures[name][key].value if key in figures.get(name, {}) else None
        for method, figures in sweep.published.items()
        if any(key in figures.get(other, {}) for other in sweep.names)
    }


def mean(
    sweep: Sweep,
    found: Found,
    own: str,
    categories: Mapping[str, Table],
    seeds: Sequence[int],
    key: str,
) -> Table:
    """One figure over the classes."""
    rows = [part[key] for part in categories.values()]
    parts = {}
    for kind in KINDS:
        values = [part[kind]["mean"] for part in rows]
        by_seed = [
            mean_of([found[kind].get((name, seed), {}).get(key) for name in sweep.names])
            for seed in seeds
        ]
        parts[kind] = spread(values) | {"deviation": spread(by_seed)["deviation"]}
    compared = [part for part in rows if part["difference"] is not None]
    return {
        **parts[own],
        **parts,
        "published": {
            method: mean_of([part["published"][method] for part in compared])
            for method in rows[0]["published"]
        },
        "difference": mean_of([part["difference"] for part in compared]),
        "compared": len(compared),
    }


def spread(values: Sequence[float | None]) -> Table:
    """Mean and sample deviation of what is known."""
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "deviation": stdev(known) if len(known) > 1 else None,
    }
