"""Words from elsewhere, made fit to be shown; words that were meant."""

import difflib
import re
from collections.abc import Iterable

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, and those that turn the direction of what stands around them;
lines and tabs may be ours."""


def printable(text: str) -> str:
    """The text with control characters spelt out, lest the name of a file steers the terminal."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """The same for the cell of a table, which no name may break."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def meant(name: str, known: Iterable[str]) -> str:
    """The beginning of a remedy: which of the known names comes nearest; "" where none is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {found[0]}? " if found else ""
