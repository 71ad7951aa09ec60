"""What others publish: a CSV beside a recipe, of the same stem."""

import csv
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kdad_dist.errors import DataError
from kdad_dist.report.text import ACCURACY, COLUMNS

METRICS = {**ACCURACY, **COLUMNS}
"""Every figure that a run may have, and its name for a person."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Published:
    """One figure, and what to know of it."""

    value: Annotated[float, Field(ge=0, le=1)]
    source: Annotated[str, Field(min_length=1)]
    note: str = ""
    """How it came about, where that is not how ours do."""


def read_published(recipe: Path) -> dict[str, dict[str, Published]]:
    """The published figures of a recipe: by class (or variant), then by metric; {} of most.

    Raises:
        DataError: a line of the file is wrong.
    """
    path = recipe.with_suffix(".csv")
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Published]] = {}
    remedy = "its columns are class, metric, value, source, note; values are from 0 to 1"
    with path.open(encoding="utf-8", newline="") as file:
        for row in (rows := csv.DictReader(file)):
            where = f"{path}:{rows.line_num}"
            name, metric = row.pop("class", None), row.pop("metric", None)
            if not name or metric not in METRICS:
                raise DataError(
                    f"{where}: class {name!r}, metric {metric!r}",
                    f"{remedy}; metrics are {', '.join(METRICS)}",
                )
            if metric in found.setdefault(name, {}):
                raise DataError(f"{where}: {metric} of {name!r} stands twice", "keep one of them")
            try:
                found[name][metric] = TypeAdapter(Published).validate_python(row)
            except ValidationError as error:
                first = error.errors()[0]
                column = ".".join(map(str, first["loc"]))
                raise DataError(f"{where}: {column}: {first['msg']}", remedy) from None
    return found
