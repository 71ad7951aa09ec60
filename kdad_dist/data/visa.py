"""VisA's layout: a table says of every image which product, split, label and mask it has."""

import csv
from collections.abc import Sequence
from pathlib import Path, PurePath

from kdad_dist.data.index import Split
from kdad_dist.data.records import Record, Scan, choose, make_key
from kdad_dist.errors import DataError

COLUMNS = ("object", "split", "label", "image", "mask")
NORMAL = "normal"


def find_table(root: Path) -> Path | None:
    """The split table of `root`: of several, the one-class split that the data set ships.

    Raises:
        DataError: there are several, and none is split_csv/1cls.csv.
    """
    files = [*sorted(root.glob("split_csv/*.csv")), *sorted(root.glob("*.csv"))]
    tables = [file for file in files if set(COLUMNS) <= set(_header(file))]
    one_class = root / "split_csv" / "1cls.csv"
    if len(tables) > 1 and one_class not in tables:
        names = ", ".join(str(table.relative_to(root)) for table in tables)
        raise DataError(
            f"{root} holds several split tables: {names}",
            "leave one of them there, or name one split_csv/1cls.csv",
        )
    return one_class if one_class in tables else next(iter(tables), None)


def read_visa(result: Scan, categories: Sequence[str] | None) -> None:
    """Adds the rows of the table; paths in it count from the root.

    The label `normal` is normal, any other is a defect type.
    """
    table = find_table(result.root)
    assert table is not None  # the layout was recognised by it
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(enumerate(csv.DictReader(file, restval=""), start=2))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not a table in UTF-8: {error}", "save it as CSV") from None
    wanted = choose(sorted({row["object"] for _, row in rows}), categories, result.root)
    masked = {row["object"] for _, row in rows if row["mask"]}
    for line, row in rows:
        if row["object"] not in wanted:
            continue
        path = result.root / row["image"].lstrip("/")  # an absolute one is refused below
        if problem := _problem(result.root, row, row["object"] in masked):
            result.faults.append((path, f"{problem} (line {line} of {table.name})"))
            continue
        defective = row["label"] != NORMAL
        result.records.append(
            Record(
                key=make_key(path.relative_to(result.root)),
                path=path,
                split=Split(row["split"]),
                category=row["object"],
                defect_type=row["label"] if defective else None,
                gt_label=int(defective),
                mask=result.root / row["mask"] if row["mask"] else None,
            )
        )


def _problem(root: Path, row: dict[str, str], masked: bool) -> str | None:
    """Why the row cannot be used."""
    for name in (row["image"], row["mask"]):
        if ".." in PurePath(name).parts or PurePath(name).is_absolute():
            return f"{name} points out of the folder"
    if row["split"] not in {Split.TRAIN, Split.TEST}:
        return f"the split is {row['split']!r}, neither train nor test"
    if not row["label"] or not row["object"]:
        return "label or object is empty"
    if PurePath(row["object"]).name != row["object"]:
        return f"the object {row['object']!r} is no name of a folder"
    if not (root / row["image"]).is_file():
        return "does not exist"
    if row["label"] != NORMAL and masked and not row["mask"]:
        return "has no mask, unlike others"
    if row["mask"] and not (root / row["mask"]).is_file():
        return f"its mask {row['mask']} does not exist"
    return None


def _header(file: Path) -> list[str]:
    if not file.is_file():  # a pipe, say
        return []
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return next(csv.reader(lines), [])
    except (UnicodeDecodeError, csv.Error):
        return []
