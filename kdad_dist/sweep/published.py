"""What others publish: a CSV beside a recipe, of the same stem."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kdad_dist.errors import DataError
from kdad_dist.report.text import ACCURACY, COLUMNS

METRICS = {**ACCURACY, **COLUMNS}
"""Every figure that a run may have, and its name for a person."""
OWN = "published"
"""The method of a figure that names none: what the recipe is of."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Published:
    """One figure, and what to know of it."""

    value: Annotated[float, Field(ge=0, le=1)]
    source: Annotated[str, Field(min_length=1)]
    note: str = ""
    """How it came about, where that is not how ours do."""


Figures = Mapping[str, Mapping[str, Mapping[str, Published]]]
"""By method, in the order of the file, then by class (or variant), then by metric."""


def read_published(recipe: Path) -> Figures:
    """The published figures of a recipe; {} of most.

    Raises:
        DataError: a line of the file is wrong.
    """
    path = recipe.with_suffix(".csv")
    if not path.is_file():
        return {}
    found: dict[str, dict[str, dict[str, Published]]] = {}
    remedy = (
        "its columns are class, metric, value, source, note, and method where there are several; "
        "values are from 0 to 1"
    )
    with path.open(encoding="utf-8", newline="") as file:
        for row in (rows := csv.DictReader(file)):
            where = f"{path}:{rows.line_num}"
            name, metric = row.pop("class", None), row.pop("metric", None)
            if not name or metric not in METRICS:
                raise DataError(
                    f"{where}: class {name!r}, metric {metric!r}",
                    f"{remedy}; metrics are {', '.join(METRICS)}",
                )
            figures = found.setdefault(row.pop("method", None) or OWN, {}).setdefault(name, {})
            if metric in figures:
                raise DataError(
                    f"{where}: {metric} of {name!r} stands twice",
                    "keep one of them, or say in a column `method` of which method each is",
                )
            try:
                figures[metric] = TypeAdapter(Published).validate_python(row)
            except ValidationError as error:
                first = error.errors()[0]
                column = ".".join(map(str, first["loc"]))
                raise DataError(f"{where}: {column}: {first['msg']}", remedy) from None
    return found


def by_method(found: Mapping[str, Any]) -> Figures:
    """The figures that a table holds; those of one that knew no methods yet are of OWN."""
    if any("value" in figure for rows in found.values() for figure in rows.values()):
        found = {OWN: found}
    return TypeAdapter(Figures).validate_python(found)
