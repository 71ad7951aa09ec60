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
    typed = "".join(body for language, body in BLOCK.findall(text) if not language)
    for line in typed.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
            if part.strip():
                yield Command(name, " ".join(part.split()), True)
    for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text)):
        if COMMAND.match(span):
            yield Command(name, " ".join(span.split()), False)


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""Its language, and what stands in it. Every line of a block without a language is typed."""
COMMAND = re.compile(
    r"([A-Z_]+=\S+\s)*(kdad |make [a-z]|launch/\w+\.sh|sbatch |accelerate l|python |benchmarks/"
    r"|examples/\S+ |\.venv/bin/|\.ci/|(pip|hf|wandb|export)\s\S)"
)
"""What a span of code begins with that is typed, or names what is."""
FOUND = [command for path in DOCUMENTS for command in commands(path)]
