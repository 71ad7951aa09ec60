"""From a YAML file, or the name of a shipped recipe, to a checked configuration, and back.

`load` applies `a.b=c` overrides too; `dump` writes the resolved configuration.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from kdad_dist.config.data import DataConfig as DataConfig
from kdad_dist.config.errors import YamlSource, describe
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import ConfigError
from kdad_dist.wording import beside, kdad, meant

CONFIG_FILE = "config.yaml"
"""The configuration of a run, in its directory."""
SWEEP_FILE = "sweep.yaml"
"""The configuration of a sweep, in the directory that holds its runs."""
MOST = 10
"""Runs of a sweep that are named where one of them was meant."""


def recipes_directory() -> Path:
    """Where the shipped YAML files are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_directory().glob("*.yaml"))


def find(name: str) -> Path:
    """The YAML file at this path, or the shipped recipe of this name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        near = beside(path, "*.yaml", "*.yml") or meant(path.stem, recipe_names())
        raise ConfigError(f"there is no config file {name}", f"{near}check the path")
    recipe = recipes_directory() / f"{name}.yaml"
    if recipe.is_file():
        return recipe
    own = path / CONFIG_FILE  # of a run that is to go on
    near = f"did you mean {own}? " if own.is_file() else meant(name, recipe_names())
    raise ConfigError(
        f"{name!r} is neither a .yaml file nor a shipped recipe",
        f"{near}give a path that ends in .yaml, or one of: {', '.join(recipe_names())}",
    )


def load(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a file or recipe, with `a.b=c` overrides applied.

    Raises:
        ConfigError: naming every wrong value with its dotted path, and its file and line.
    """
    path = find(str(config))
    source = YamlSource.read(path)
    for override in overrides:
        source.override(override)
    return check(source)


def override(key: str, value: Any) -> str:
    """`key=value` as `load` reads it, the value plain where YAML takes it so."""
    # PyYAML leaves some characters as they are that its own reader takes for ends of lines.
    readable = json.dumps(value, ensure_ascii=False).isprintable()
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=readable, width=math.inf)
    return f"{key}={text}".removesuffix("\n").removesuffix("\n...")


def elsewhere(config: RunConfig, more: str) -> str:
    """The override that gives a configuration another directory, by the key that it has this of."""
    key, value = ("output", config.output) if config.output else ("name", config.name)
    return override(key, f"{value}-{more}")


def load_run(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run directory was made with; `output` is the directory itself.

    Raises:
        ConfigError: the directory holds no run.
    """
    return load(config_of(run), [*overrides, override("output", str(run))])


def config_of(run: Path) -> Path:
    """The file of the configuration that a run directory was made with.

    Raises:
        ConfigError: there is no such directory, or it holds no run.
    """
    path = run / CONFIG_FILE
    if path.is_file():
        return path
    if (run / SWEEP_FILE).is_file():
        raise _of_sweep(run)
    near = beside(run, f"*/{CONFIG_FILE}", f"*/{SWEEP_FILE}")
    no_run = f"is not a run directory: it holds no {CONFIG_FILE}"
    wrong = no_run if run.exists() else "does not exist"
    raise ConfigError(
        f"{run} {wrong}", f"{near}give the directory that `kdad train` wrote, such as runs/NAME"
    )


def _of_sweep(directory: Path) -> ConfigError:
    """What is wrong with a sweep where one of its runs is wanted."""
    names = sorted(run.parent.name for run in directory.glob(f"*/{CONFIG_FILE}"))
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    runs = f"its runs are {', '.join(names[:MOST])}{more}" if names else "no run of it has begun"
    such = f", such as {directory / names[0]}" if names else ""
    return ConfigError(
        f"{directory} is a sweep; {runs}",
        f"give one of its runs{such}; `{kdad('status', directory)}` shows them",
    )


def check(source: YamlSource) -> RunConfig:
    try:
        return TypeAdapter(RunConfig).validate_python(source.values)
    except ValidationError as error:
        raise describe(error, source, RunConfig) from None


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested dicts, lists and scalars."""
    return json.loads(json.dumps(asdict(config)))
