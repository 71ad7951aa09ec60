"""What `kdad compare` shows to a person."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdad_dist.report.text import COLUMNS, SYNTHETIC
from kdad_dist.wording import aligned, on_one_line

Facts = dict[str, Any]
TITLES = {"synthetic": SYNTHETIC, "held_out": "held-out images"}


def told(facts: Facts) -> str:
    """Everything that `compare` found, in tables."""
    names = titles([run["directory"] for run in facts["runs"]])
    parts = [
        "\n".join(facts["notes"]),
        table("configuration", names, config_rows(facts["config"])),
        table("figures", [*names, *pair(names)], list(figure_rows(facts["metrics"]))),
        *(images(kind, names, found) for kind, found in facts["images"].items()),
    ]
    return "\n\n".join(part for part in parts if part)


def titles(directories: Sequence[str]) -> list[str]:
    """The runs as short as they can be told apart."""
    short = [Path(directory).name for directory in directories]
    return short if len(set(short)) == len(short) else list(directories)


def pair(names: Sequence[str]) -> list[str]:
    """The title of the column with differences, which two runs have."""
    return ["second - first"] if len(names) == 2 else []


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"{title}: no difference" if title == "configuration" else ""
    return "\n".join(aligned([(title, *names), *rows]))


def config_rows(found: dict[str, list[Any]]) -> list[list[str]]:
    def shown(value: Any) -> str:
        return "-" if value is None else value if isinstance(value, str) else json.dumps(value)

    return [[key, *map(shown, values)] for key, values in found.items()]


def figure_rows(metrics: dict[str, dict[str, list[float | None]]]) -> Iterator[list[str]]:
    """The mean of several categories comes after them, and last what one may choose by."""
    names = [name for name in metrics if name.startswith("category ")]
    rest = [name for name in metrics if name not in names and (name != "mean" or len(names) != 1)]
    for name in names + rest:
        for key, values in metrics[name].items():
            known = [value for value in values if value is not None]
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            if len(values) == 2:
                cells.append(f"{known[1] - known[0]:+.4f}" if len(known) == 2 else "")
            of = "all classes" if (name, key) == ("mean", "accuracy") else TITLES.get(name, name)
            yield [f"{of.removeprefix('category ')} {COLUMNS.get(key, key)}", *cells]


def images(kind: str, names: Sequence[str], found: Sequence[Facts]) -> str:
    """The images of a kind: what they are, what each run says of them (score and rank, or class and
    confidence), and a picture where one of them kept it, which is the same in each; what the run
    saw in it lies beside it.
    """
    if not found:
        return ""
    rows = []
    for image in found:
        if kind == "classes":
            said = zip(image["told"], image["scores"], strict=True)
            cells = [image["class_name"], *(f"{told} ({score:.4f})" for told, score in said)]
        else:
            said = zip(image["scores"], image["ranks"], strict=True)
            cells = [image["defect_type"] or "good"]
            cells += [f"{score:.4g} (rank {rank:g})" for score, rank in said]
        rows.append([image["key"], *cells])
    first = found[0]
    header = f"{kind} images judged most differently: their ranks among all {first['of']} images"
    if kind == "classes":
        header = f"images taken for different classes, {first['differing']} of {first['of']}"
    titled, *lines = aligned([["", "", *names], *rows], left=2)
    pictures = [next(filter(None, image["pictures"]), "") for image in found]
    shown = [
        f"{row}  {on_one_line(path)}".rstrip() for row, path in zip(lines, pictures, strict=True)
    ]
    return "\n".join([header, f"{titled}  picture" if any(pictures) else titled, *shown])
