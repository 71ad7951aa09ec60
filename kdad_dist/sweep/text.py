"""The table of a sweep as a person reads it: Markdown, LaTeX, and CSV for spreadsheets."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kdad_dist.report.text import ACCURACY, COLUMNS
from kdad_dist.sweep.jobs import KINDS
from kdad_dist.sweep.published import METRICS, OWN

Table = dict[str, Any]
"""The content of `table.json`."""
NONE = "-"
PARTS = {
    "": lambda figure: figure["mean"],
    "_deviation": lambda figure: figure["deviation"],
    "_selected": lambda figure: figure["selected"]["mean"],
    "_final": lambda figure: figure["final"]["mean"],
    "_published": lambda figure: first(figure["published"]),
    "_difference": lambda figure: figure["difference"],
}
"""Of each figure in the CSV: the end of a column's name, and what stands there."""
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {c: f"\\{c}" for c in "&%$#_{}"} | {
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


@dataclass(frozen=True)
class Grid:
    """One table, all cells as texts; the first of each line is a name."""

    caption: str
    head: list[str]
    body: list[list[str]]
    foot: list[list[str]]
    """Means."""


def grids(found: Table) -> list[Grid]:
    """The tables that people look at: all figures, and then closely those that are published."""
    return [overview(found, known(found)), *(comparison(found, key) for key in compared(found))]


def known(found: Table) -> list[str]:
    """The figures that some run has; all that are to come where none is scored yet."""
    rows = found["categories"].values()
    any_has = [
        k
        for k in METRICS
        if any(row[k][kind]["mean"] is not None for row in rows for kind in KINDS)
    ]
    return any_has or list(ACCURACY if found["tells_classes"] else COLUMNS)


def compared(found: Table) -> list[str]:
    """The figures to look at closely: those that are published, or else the first."""
    rows, keys = found["categories"].values(), known(found)
    return [k for k in keys if any(row[k]["published"] for row in rows)] or keys[:1]


def overview(found: Table, keys: Sequence[str]) -> Grid:
    """All figures of the checkpoint that counts."""

    def line(name: str, seeds: str, row: Table) -> list[str]:
        return [name, seeds, *(cell(row[key]["mean"], row[key]["deviation"]) for key in keys)]

    return Grid(
        f"Of the {found['checkpoint']} checkpoints",
        [found["rows"], "seeds", *(METRICS[key] for key in keys)],
        [line(name, str(row["seeds"]), row) for name, row in found["categories"].items()],
        [line(mean_label(found), "", found["mean"])] if found["mean"] else [],
    )


def comparison(found: Table, key: str) -> Grid:
    """One figure of both checkpoints, beside the published ones; the difference is to the first."""
    rows = {name: row[key] for name, row in found["categories"].items()}
    methods = list(next(iter(rows.values()))["published"])  # the same of each
    means: dict[str, Table] = {}
    if found["mean"]:
        mean = means[mean_label(found)] = found["mean"][key]
        like = [row for row in rows.values() if row["difference"] is not None]
        if 0 < len(like) < found["mean"]["categories"]:
            # Only the mean over the same classes may stand beside that of others.
            means[mean_label(found)] = {**mean, "published": {}, "difference": None}
            means[f"mean of the {len(like)} published"] = mean | {
                kind: {"mean": mean_of([row[kind]["mean"] for row in like])} for kind in KINDS
            }
    return Grid(
        METRICS[key],
        beside([found["rows"], *KINDS], methods, "difference"),
        [compared_line(name, row, methods) for name, row in rows.items()],
        [compared_line(name, row, methods) for name, row in means.items()],
    )


def compared_line(name: str, figure: Table, methods: Sequence[str]) -> list[str]:
    ours = [cell(figure[kind]["mean"], figure[kind].get("deviation")) for kind in KINDS]
    theirs = [cell(figure["published"].get(method), None) for method in methods]
    difference = figure["difference"]
    return beside([name, *ours], theirs, NONE if difference is None else f"{difference:+.4f}")


def beside(ours: list[str], theirs: list[str], difference: str) -> list[str]:
    """Cells of a line: the difference follows what it is to."""
    return [*ours, *theirs[:1], difference, *theirs[1:]] if theirs else ours


def cell(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, for the others have another mean."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def mean_label(found: Table) -> str:
    done, classes = found["mean"]["categories"], len(found["categories"])
    return "mean" if done == classes else f"mean of {done} of {classes}"


def remarks(found: Table) -> list[str]:
    """What to know of the figures, a sentence or two for each matter."""
    own, other = found["checkpoint"], next(k for k in KINDS if k != found["checkpoint"])
    rule = " or ".join(found["rules"]["selected"]) or "not known yet"
    images = "all images, with their labels" if found["tells_classes"] else "normal images alone"
    said = [
        f"Selected: {rule} ({images}); final: the last step. The {own} checkpoint counts "
        f"(score.checkpoint), the {other} one stands beside it.",
    ]
    if found["seeds"] > 1:
        said.append("Mean ± sample deviation over seeds.")
    told: dict[tuple[str, str], list[str]] = {}
    for method, classes in found["published"].items():
        for key, figure in (pair for figures in classes.values() for pair in figures.items()):
            whats = told.setdefault((method, quoted(**figure)), [])
            whats += [METRICS[key]] * (METRICS[key] not in whats)
    for (method, source), whats in told.items():
        said.append(f"Published {' and '.join(whats)}{of(method)}: {source}.")
    said += found["cautions"]
    return said


def first(published: dict[str, float | None]) -> float | None:
    """Of the method that is compared closely."""
    return next(iter(published.values()), None)


def of(method: str) -> str:
    return "" if method == OWN else f" of {method}"


def quoted(source: str, note: str, **_: Any) -> str:
    """Whose a published figure is, and how it came about."""
    return f"{source} ({note})" if note else source


def missing(run: Table) -> str:
    reason = f": {run['reason'].splitlines()[0]}" if run["reason"] else ""
    return f"{run['category']}, seed {run['seed']}: {run['state']}{reason}"


def as_markdown(found: Table) -> str:
    """Tables that are aligned, so that they also read well as plain text."""
    blocks = [f"{grid.caption}:\n\n{aligned(grid)}" for grid in grids(found)]
    blocks += remarks(found)
    if found["missing"]:
        lines = [f"Missing are {len(found['missing'])} of {len(found['runs'])} runs:", ""]
        blocks.append("\n".join([*lines, *(f"- {missing(run)}" for run in found["missing"])]))
    return "\n\n".join(blocks) + "\n"


def aligned(grid: Grid) -> str:
    rows = [
        [cell.replace("|", "\\|") for cell in row] for row in (grid.head, *grid.body, *grid.foot)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(grid.head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in [rows[0], rule, *rows[1:]]
    )


def as_latex(found: Table) -> str:
    """Tables for a paper; they need the package booktabs."""
    return "\n".join(tabular(grid) for grid in grids(found)) + "".join(
        f"% {' '.join(remark.split())}\n" for remark in remarks(found)
    )


def tabular(grid: Grid) -> str:
    def line(cells: Sequence[str]) -> str:
        texts = ("".join(TEX.get(c, c) for c in " ".join(cell.split())) for cell in cells)
        return "  " + " & ".join(texts) + r" \\"

    parts = [[grid.head], grid.body, grid.foot]
    lines = "\n  \\midrule\n".join("\n".join(map(line, part)) for part in parts if part)
    columns = "l" + "r" * (len(grid.head) - 1)
    return (
        f"% {grid.caption}\n\\begin{{tabular}}{{{columns}}}\n  \\toprule\n{lines}\n"
        "  \\bottomrule\n\\end{tabular}\n"
    )


def as_csv(found: Table) -> str:
    """A line for each class and one for the mean, each figure in a column of its own.

    The mean's `runs` are all that count; `is_mean` tells it from a class of that name.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    any_row = next(iter(found["categories"].values()))
    others = [(key, method) for key in METRICS for method in list(any_row[key]["published"])[1:]]
    columns = [f"{key}{part}" for key in METRICS for part in PARTS]
    columns += [f"{key}_published_{method}" for key, method in others]
    ends = ["is_mean", "published_from", "cautions"]
    writer.writerow(["category", "runs", "of", *columns, *ends])
    rows = [(name, row, False) for name, row in found["categories"].items()]
    count = sum(row["seeds"] for row in found["categories"].values())
    means = [("mean", found["mean"], True)] if found["mean"] else []
    for name, row, is_mean in [*rows, *means]:
        runs = (count, len(found["runs"])) if is_mean else (row["seeds"], found["seeds"])
        figures = [at(row[key]) for key in METRICS for at in PARTS.values()]
        figures += [row[key]["published"][method] for key, method in others]
        told = "; ".join(
            f"{key}{of(method)}: {quoted(**figure)}"
            for method, classes in found["published"].items()
            for key, figure in (() if is_mean else classes.get(name, {}).items())
        )
        minded = " ".join(s for s, names in found["cautions"].items() if is_mean or name in names)
        writer.writerow([name, *runs, *figures, int(is_mean), told, minded])
    return out.getvalue()
