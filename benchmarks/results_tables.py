"""Markdown tables of `docs/results.md`, from the `metrics.json` of runs that differ in their seed.

python benchmarks/results_tables.py --runs TITLE RUN RUN RUN [--runs TITLE RUN ...]
python benchmarks/results_tables.py --choices choices.json [--top 12] [--around KEY=VALUE ...]
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_aupro": "AUPRO"}


def spread(values: list[float | None]) -> str:
    """Mean and, of several seeds, deviation; a dash where a figure does not exist."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{mean(known):.3f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.3f}"


def markdown(rows: list[list[str]]) -> str:
    header, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body]]
    return "\n".join(lines)


def runs_table(title: str, runs: list[Path], name: str = "metrics.json") -> str:
    """One table: all defects, then each defect type, over the seeds."""
    found = [json.loads((run / name).read_text()) for run in runs]
    rows = [[title, "images", *FIGURES.values()]]
    for category in found[0]["categories"]:
        entries = [metrics["categories"][category] for metrics in found]
        rows.append(line(category, entries))
        for kind in entries[0]["defect_types"]:
            rows.append(line(kind, [entry["defect_types"][kind] for entry in entries]))
    origin = [metrics["provenance"] for metrics in found]
    steps = ", ".join(str(o["checkpoint_step"]) for o in origin)
    commits = ", ".join(sorted({str(o["commit"]) for o in origin}))
    return f"{markdown(rows)}\n\nCheckpoint steps {steps}; commit {commits}; {len(runs)} seeds.\n"


def line(name: str, entries: list[dict[str, Any]]) -> list[str]:
    figures = [spread([entry[key] for entry in entries]) for key in FIGURES]
    return [name, str(entries[0]["images"]), *figures]


def choices_table(path: Path, top: int, around: dict[str, str]) -> str:
    """Candidates, the figure that one may choose by first, the test figures behind it.

    Ranked by the first, or, given a way of reading, that one and all that differ from it in one
    thing.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    found = json.loads(path.read_text())
    for row in found:
        groups[tuple(row["reading"].values())].append(row)

    def selection(rows: list[dict[str, Any]]) -> float:
        return mean(row["synthetic"]["image_auroc"] for row in rows)

    shown = sorted(groups.items(), key=lambda item: selection(item[1]), reverse=True)
    if around:
        assert around.keys() == found[0]["reading"].keys(), list(found[0]["reading"])
        center = tuple(around[key] for key in found[0]["reading"])
        distance = {key: sum(a != b for a, b in zip(key, center, strict=True)) for key, _ in shown}
        shown = sorted(
            (item for item in shown if distance[item[0]] <= 1), key=lambda item: distance[item[0]]
        )
    titles = [*found[0]["reading"], "synthetic image AUROC"]
    rows = [[*titles, *(f"test {name}" for name in FIGURES.values())]]
    for key, group in shown[:top] if top else shown:
        chosen_by = spread([row["synthetic"]["image_auroc"] for row in group])
        test = [spread([row["test"][name] for row in group]) for name in FIGURES]
        rows.append([*key, chosen_by, *test])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", action="append", default=[], metavar="TITLE RUN")
    parser.add_argument("--metrics", default="metrics.json", help="or metrics-last.json")
    parser.add_argument("--choices", type=Path)
    parser.add_argument("--top", type=int, default=0, help="0: every candidate")
    parser.add_argument("--around", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    for title, *runs in options.runs:
        print(runs_table(title, [Path(run) for run in runs], options.metrics))
    if options.choices:
        around = dict(item.split("=", 1) for item in options.around)
        print(choices_table(options.choices, options.top, around))


if __name__ == "__main__":
    main()
