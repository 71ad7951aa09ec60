"""What surrounds the code is in order: sizes, packaging, recipes, scripts, the list of keys."""

import ast
import configparser
import dataclasses
import json
import re
import shutil
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdad_dist.config.load import find, load, recipe_names
from kdad_dist.config.run import RunConfig
from tests.needs import REPOSITORY, require_or_skip

FOLDERS = (
    ".ci",
    "benchmarks",
    "configs",
    "docs",
    "examples",
    "kdad_dist",
    "launch",
    "shards",
    "slurm",
    "tests",
)
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project, with its path from the root."""
    nested = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    for path in [*REPOSITORY.iterdir(), *nested]:
        # In a further work tree of git, .git is a file.
        if path.is_file() and path.name != ".git" and "__pycache__" not in path.parts:
            try:
                yield path.relative_to(REPOSITORY), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_files_and_functions_fit_the_eye() -> None:
    wrong = []
    for path, text in texts():
        if path.suffix != ".py" or path.parts[0] not in ("kdad_dist", "benchmarks"):
            continue
        if (lines := text.count("\n")) > MOST_LINES_OF_A_FILE:
            wrong.append(f"{path} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    wrong.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_for_later() -> None:
    mark = re.compile("TO" "DO|FIX" r"ME|\bXX" r"X\b")
    wrong = [str(path) for path, text in texts() if mark.search(text)]
    assert not wrong


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    path_of_a_machine = re.compile(r"(?<![\w./*{}-])/(?:work|root|home|Users)/\w")
    wrong = [
        f"{path}: {found.group()}"
        for path, text in texts()
        if path != Path(__file__).relative_to(REPOSITORY)
        and (found := path_of_a_machine.search(text))
    ]
    assert not wrong, "\n".join(wrong)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


def test_setup_cfg_lists_every_package() -> None:
    listed = set(setup_cfg()["options"]["packages"].split())
    package = REPOSITORY / "kdad_dist"
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in package.rglob("*.py")}
    assert found <= listed, f"missing in setup.cfg: {sorted(found - listed)}"


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("kdad_dist.recipes", "configs"),
        ("kdad_dist.recipes.variants", "configs/variants"),
        ("kdad_dist.launch", "launch"),
        ("kdad_dist.launch.accelerate", "launch/accelerate"),
        ("kdad_dist.slurm", "slurm"),
    ],
)
def test_the_wheel_takes_every_file_of_a_folder_outside_the_package(
    package: str, folder: str
) -> None:
    patterns = re.split(r"[,\s]+", setup_cfg()["options.package_data"][package])
    files = [path for path in (REPOSITORY / folder).iterdir() if path.is_file()]
    left = [path.name for path in files if not any(path.match(pattern) for pattern in patterns)]
    assert files and not left, f"setup.cfg, {package}: no pattern for {left}"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_how_to_run_it(name: str) -> None:
    path = find(name)
    config = load(path)
    of_one = str(config.data.normal_class or config.data.category)
    assert name == "demo" or not config.name.endswith(f"-{of_one}"), "a sweep goes by this name too"
    assert path.read_text(encoding="utf-8").startswith("#"), "a recipe starts with its header"


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        require_or_skip("shellcheck", "shellcheck is not installed (apt-get install shellcheck)")
    scripts = [
        str(path)
        for path, text in texts()
        if text.startswith(("#!/bin/bash", "#!/usr/bin/env bash")) or path.suffix == ".sh"
    ]
    assert scripts
    result = subprocess.run(
        [shellcheck, "--external-sources", *scripts],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def keys(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of the configuration, with its default as docs/config.md writes it."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        # A section may be one of several dataclasses (the methods), or absent (null).
        options = typing.get_args(hints[field.name]) or (hints[field.name],)
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        for section in sections:
            yield from keys(typing.cast(type, section), f"{name}.")
        if not sections:
            yield name, written(field)


def written(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return value if isinstance(value, str) else json.dumps(value)


def test_the_documentation_lists_every_key_with_its_default() -> None:
    text = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([a-z0-9_.]+)` \| `?([^|`]*)`? \|", text, re.MULTILINE)
    assert sorted(documented) == sorted(keys(RunConfig))


def test_links_between_documents_lead_somewhere() -> None:
    link = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
    wrong = [
        f"{path}: {target}"
        for path, text in texts()
        if path.suffix == ".md"
        for target in link.findall(text)
        if not (REPOSITORY / path.parent / target).exists()
    ]
    assert not wrong, "\n".join(wrong)
