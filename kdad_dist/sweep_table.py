"""The table of a sweep: every class with mean and deviation over its seeds, at any time."""

import csv
import io
import json
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from kdad_dist import files
from kdad_dist.report_text import COLUMNS
from kdad_dist.runtime.rundir import metrics_file
from kdad_dist.sweep import NOT_SCORED, NOT_STARTED, SCORED, Job, Sweep

Table = dict[str, Any]


def write_table(sweep: Sweep) -> Table:
    """Writes `table.json`, `table.csv` and `table.md` of the runs as they are now.

    Raises:
        DataError: the directory cannot be written.
    """
    found = table(sweep)
    with files.writing(sweep.directory):
        sweep.directory.mkdir(parents=True, exist_ok=True)
        files.write_json(sweep.directory / "table.json", found)
        files.write_text(sweep.directory / "table.csv", as_csv(found))
        files.write_text(sweep.directory / "table.md", as_markdown(found))
    return found


def table(sweep: Sweep) -> Table:
    """The content of `table.json`.

    `categories` and `mean` hold for each figure its `mean` and its `deviation` (of a sample; null
    of one seed). The deviation of the mean is that of the mean over classes, from seed to seed.
    Only runs that are scored count; what is missing stands under `missing`.
    """
    runs = [entry(job) for job in sweep.jobs]
    scored = {(r["category"], r["seed"]): r["metrics"] for r in runs if r["metrics"]}
    seeds = sorted({seed for _, seed in scored})
    categories = {
        name: {
            "seeds": sum((name, seed) in scored for seed in seeds),
            **{key: spread([scored.get((name, s), {}).get(key) for s in seeds]) for key in COLUMNS},
        }
        for name in sweep.categories
    }
    mean: Table = {"categories": sum(row["seeds"] > 0 for row in categories.values())}
    for key in COLUMNS:
        parts = [row[key]["mean"] for row in categories.values() if row[key]["mean"] is not None]
        by_seed = [mean_over_categories(sweep, scored, seed, key) for seed in seeds]
        mean[key] = {
            "mean": fmean(parts) if parts else None,
            "deviation": spread(by_seed)["deviation"],
        }
    return {
        "name": sweep.base.name,
        "complete": len(scored) == len(runs),
        "seeds": sweep.seeds,
        "categories": categories,
        "mean": mean,
        "missing": [{k: r[k] for k in MISSING} for r in runs if r["state"] != SCORED],
        "runs": runs,
    }


MISSING = ("category", "seed", "state", "reason")


def entry(job: Job) -> Table:
    state = job.state()
    metrics = None
    if state == SCORED:
        metrics = json.loads(metrics_file(job.config).read_text(encoding="utf-8"))["mean"]
    reason = None
    if state in ("failed", NOT_SCORED, NOT_STARTED):
        reason = job.last_words() or files.read_json(job.run / "status.json").get("reason")
    return {
        "category": job.category,
        "seed": job.config.seed,
        "directory": str(job.run),
        "state": state,
        "reason": reason,
        "metrics": metrics,
    }


def spread(values: Sequence[float | None]) -> Table:
    """Mean and sample deviation of what is known."""
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "deviation": stdev(known) if len(known) > 1 else None,
    }


def mean_over_categories(
    sweep: Sweep, scored: dict[tuple[str, int], Table], seed: int, key: str
) -> float | None:
    """Of one seed; None where a class is missing, for the others have another mean."""
    values = [scored.get((name, seed), {}).get(key) for name in sweep.categories]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def as_csv(found: Table) -> str:
    """A line for each class and one for the mean, figures and deviations in columns of their own.

    The mean's `runs` are all that count; the last column tells it from a class of that name.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [name for key in COLUMNS for name in (key, f"{key}_deviation")]
    writer.writerow(["category", "runs", "of", *columns, "is_mean"])
    rows = [(name, row, False) for name, row in found["categories"].items()]
    count = sum(row["seeds"] for row in found["categories"].values())
    for name, row, is_mean in [*rows, ("mean", found["mean"], True)]:
        figures = [row[key][part] for key in COLUMNS for part in ("mean", "deviation")]
        runs = (count, len(found["runs"])) if is_mean else (row["seeds"], found["seeds"])
        writer.writerow([name, *runs, *figures, int(is_mean)])
    return out.getvalue()


def as_markdown(found: Table) -> str:
    """The table for a person, aligned so that it also reads well as plain text."""
    categories, mean = found["categories"], found["mean"]
    done = mean["categories"]
    label = "mean" if found["complete"] else f"mean of {done} of {len(categories)}"
    rows = [["class", "seeds", *COLUMNS.values()]]
    rows += [line(name, str(row["seeds"]), row) for name, row in categories.items()]
    rows.append(line(label, "", mean))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in [rows[0], rule, *rows[1:]]
    ]
    if found["missing"]:
        lines += ["", f"Missing are {len(found['missing'])} of {len(found['runs'])} runs:", ""]
        lines += [missing(run) for run in found["missing"]]
    return "\n".join(lines) + "\n"


def line(name: str, seeds: str, row: Table) -> list[str]:
    return [name.replace("|", "\\|"), seeds, *(cell(**row[key]) for key in COLUMNS)]


def cell(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def missing(run: Table) -> str:
    reason = f": {run['reason'].splitlines()[0]}" if run["reason"] else ""
    return f"- {run['category']}, seed {run['seed']}: {run['state']}{reason}"
