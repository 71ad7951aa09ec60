"""The variants of a configuration: a YAML file of names, and of the keys that each sets.

    teacher:
      optim.lr: 3.0e-4
    student:
      method.teacher.weights: "{teacher}"     # the directory of that run, which goes first

Keys are dotted as in `a.b=c`; a mapping takes the place of a whole section.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from kdad_dist.config.errors import YamlSource
from kdad_dist.config.load import recipes_directory
from kdad_dist.errors import ConfigError, UsageError
from kdad_dist.wording import meant

RUN = re.compile(r"\{([^{}]+)\}(/.*)?")
"""A value that stands for the directory of another variant's run, or for something in it."""


@dataclass(frozen=True)
class Variant:
    name: str
    values: Mapping[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """The variants whose runs this one starts from."""
        return frozenset(needed(self.values))

    def changes(self, runs: Mapping[str, str]) -> dict[str, Any]:
        """What it sets, with the directories of the runs filled in."""
        return {key: filled(value, runs) for key, value in self.values.items()}


def needed(value: Any) -> list[str]:
    """The names in braces among the values."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return [name for part in inner for name in needed(part)]
    found = RUN.fullmatch(value) if isinstance(value, str) else None
    return [found[1]] if found else []


def filled(value: Any, runs: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: filled(part, runs) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part, runs) for part in value]
    found = RUN.fullmatch(value) if isinstance(value, str) else None
    return runs[found[1]] + (found[2] or "") if found else value


def variant_names() -> list[str]:
    """The shipped lists of variants."""
    return sorted(path.stem for path in (recipes_directory() / "variants").glob("*.yaml"))


def find_variants(name: str) -> Path:
    """The YAML file at this path, or the shipped one of this name.

    Raises:
        ConfigError: neither exists.
    """
    shipped = recipes_directory() / "variants"
    path = Path(name) if Path(name).suffix in {".yaml", ".yml"} else shipped / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{name!r} is neither a .yaml file nor a shipped list of variants",
            f"{meant(path.stem, variant_names())}give a path that ends in .yaml, or one of: "
            f"{', '.join(variant_names())}",
        )
    return path


def read_variants(path: Path) -> list[Variant]:
    """The variants of a file, in its order.

    Raises:
        ConfigError: it is not a file of variants, or they wait for each other in a circle.
    """
    values = YamlSource.read(path).values
    wrong = [name for name, part in values.items() if not isinstance(part or {}, dict)]
    if wrong:
        raise ConfigError(
            f"{path}: {', '.join(map(str, wrong))} is not a mapping of keys to values",
            "write the name of each variant, and below it the keys that it sets",
        )
    variants = [Variant(str(name), part or {}) for name, part in values.items()]
    refuse_loose_ends(path, variants)
    return variants


def refuse_levelling(path: Path, variants: Sequence[Variant], overrides: Sequence[str]) -> None:
    """Raises:
    UsageError: an override sets, in all variants, what some of them set otherwise.
    """
    for override in overrides:
        typed = override.partition("=")[0]
        names = [v.name for v in variants if any(overlap(typed, str(key)) for key in v.values)]
        if names:
            raise UsageError(
                f"{typed} is typed for all variants, and {path} sets it in: {', '.join(names)}",
                f"copy {path} (and the .csv beside it, where its figures still hold), change "
                f"{typed} there for each variant, and give the copy to --variants",
            )


def overlap(one: str, other: str) -> bool:
    """Whether a dotted key is the other, or a section around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def refuse_loose_ends(path: Path, variants: Sequence[Variant]) -> None:
    """Raises:
    ConfigError: a variant needs one that does not exist, or itself in the end.
    """
    names = [variant.name for variant in variants]
    for variant in variants:
        unknown = sorted(variant.needs.difference(names))
        if unknown:
            raise ConfigError(
                f"{path}: variant {variant.name!r} needs {', '.join(map(repr, unknown))}, which is "
                "not there",
                f"a value in braces names one of: {', '.join(names)}",
            )
    try:
        TopologicalSorter({variant.name: variant.needs for variant in variants}).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise ConfigError(
            f"{path}: variants need each other: {circle}", "break the circle"
        ) from None
