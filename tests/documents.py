"""The commands that documents and heads of recipes tell a reader to type."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.needs import REPOSITORY

FOLDERS = ("", "docs", "launch", "shards")
DOCUMENTS = [
    *(path for folder in FOLDERS for path in sorted((REPOSITORY / folder).glob("*.md"))),
    *sorted((REPOSITORY / "configs").glob("*.yaml")),
]


class Command(NamedTuple):
    where: str
    text: str
    whole: bool
    """Whether it can be typed as it is, and is not a mention in a sentence."""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def commands(path: Path) -> Iterator[Command]:
    """What stands in blocks of code, in spans of code, and in the heads of recipes."""
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(REPOSITORY))
    if path.suffix == ".yaml":
        text = re.sub(r"\n# +(?=[a-z_]+\.[a-z_.]+=)", " ", text)  # a line of keys goes on
        head = re.findall(r"^# (?:Command:)? +(.*)", text, re.MULTILINE)
        for line in head:
            for part in re.split(r"&&|;|,? or |: | {3,}", line):
                if part.strip().startswith("kdad "):
                    yield Command(name, part.strip(), True)
        return
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
            yield Command(name, part.strip(), True)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        yield Command(name, " ".join(span.split()), False)


COMMAND = re.compile(
    r"([A-Z_]+=\S+ )*(kdad |make [a-z]|launch/\w+\.sh|sbatch |accelerate l|python ben)"
)
FOUND = [command for path in DOCUMENTS for command in commands(path) if COMMAND.match(command.text)]
