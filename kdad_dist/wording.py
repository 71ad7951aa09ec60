"""How numbers, tables, commands and names from elsewhere are shown to a person; names that were
meant.
"""

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, and those that turn the direction of what stands around them;
lines and tabs may be ours."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def printable(text: str) -> str:
    """The text with control characters spelt out, lest the name of a file steers the terminal."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """The same for the cell of a table, which no name may break."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def kdad(*words: object) -> str:
    """The command `kdad WORDS` as a shell takes it, whatever the names of its files."""
    return shlex.join(["kdad", *map(str, words)])


def meant(name: str, known: Iterable[str]) -> str:
    """The beginning of a remedy: which of the known names comes nearest; "" where none is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {found[0]}? " if found else ""


def beside(path: Path, *patterns: str) -> str:
    """The same of a path: which of the others in its folder that match, or hold what does.

    Args:
        patterns: seen from that folder: `*` matches all others, `*/` folders, `*/index.json` those
            with an index.
    """
    folder = path.parent  # whose `glob` passes over what may not be looked into
    matches = (match for pattern in patterns for match in folder.glob(pattern))
    others = {match.relative_to(folder).parts[0] for match in matches} - {path.name}
    found = difflib.get_close_matches(path.name, others, n=1)
    return f"did you mean {folder / found[0]}? " if found else ""


def amount(number: int, one: str, several: str = "") -> str:
    """1 image, 3 images; `several` where an s does not make the plural."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def enumerated(names: Sequence[str], most: int) -> str:
    """a, b and c; of more than `most`: a, b and 7 more."""
    kept = (
        list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    )
    return " and ".join([", ".join(kept[:-1]), kept[-1]] if len(kept) > 1 else kept)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def readable(count: float) -> str:
    """17 B, 1.5 KiB, 243 MiB."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} {UNITS[-1]}"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Cells in columns, the first `left` of them flush left and the others flush right."""
    rows = [[on_one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def placed(column: int, cell: str) -> str:
        return cell.ljust(widths[column]) if column < left else cell.rjust(widths[column])

    return ["  ".join(placed(*cell) for cell in enumerate(row)).rstrip() for row in rows]
