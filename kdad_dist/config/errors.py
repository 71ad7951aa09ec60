"""Reads YAML so that a wrong value can be named by its dotted path, file and line."""

import difflib
import re
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from kdad_dist.errors import ConfigError
from kdad_dist.wording import amount

Location = tuple[str | int, ...]
PLAIN = {
    "too_short": "must have at least {min_length}",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}
"""pydantic's kinds of problem that it puts in the words of programs, and how a person does."""
TYPED = "command line"
"""The place of what an override says."""
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What reading raises: ValueError for 2001-99-99, RecursionError for brackets without end."""


class Excerpt(Repr):
    """The beginning of what was found: by aliases, a list may stand for billions of values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200


@dataclass
class YamlSource:
    """The values of a YAML file, and where each of them stands."""

    path: Path
    values: dict[str, Any]
    places: dict[Location, str]

    @classmethod
    def read(cls, path: Path) -> "YamlSource":
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except (OSError, *NOT_YAML) as error:
            raise ConfigError(
                f"{path} cannot be read as YAML: {error}", "correct the file"
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path} holds {type(values).__name__}, not a mapping of keys to values",
                "start from a shipped recipe",
            )
        source = cls(path, values, {})
        source._note_places(node, (), set())
        return source

    def _note_places(
        self, node: yaml.Node | None, location: Location, before: set[yaml.Node]
    ) -> None:
        """Args:
        before: the sections that were seen. One that stands in several places by an alias could
            stand in exponentially many, or in itself.
        """
        if not isinstance(node, yaml.MappingNode):
            return
        if node in before:
            raise ConfigError(
                f"{dotted(location)} in {self.path} repeats a section by a YAML alias",
                "write it out",
            )
        before.add(node)
        for key_node, value_node in node.value:
            here = (*location, key_node.value)
            line = f"{self.path}:{key_node.start_mark.line + 1}"
            if here in self.places:
                raise ConfigError(
                    f"{dotted(here)} stands twice: {self.places[here]} and {line}",
                    "remove one of them",
                )
            self.places[here] = line
            self._note_places(value_node, here, before)

    def override(self, text: str) -> None:
        """Applies one `a.b=c`; the value is read as YAML."""
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{text!r} is not an override", "write key.subkey=value")
        target: Any = self.values
        *parents, last = here = tuple(key.split("."))
        typed = [here]
        for depth, parent in enumerate(parents, start=1):
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
                typed.append(here[:depth])
            target = target[parent]
        try:
            target[last] = yaml.safe_load(value)
        except NOT_YAML as error:
            raise ConfigError(f"the value of {text!r} is not YAML: {error}", "quote it") from None
        kept = {where: line for where, line in self.places.items() if where[: len(here)] != here}
        self.places = {**kept, **dict.fromkeys(typed, TYPED)}

    def place(self, location: Location) -> str:
        """Where the value, or the nearest section around it, stands."""
        while location and location not in self.places:
            location = location[:-1]
        return self.places.get(location, str(self.path))


def dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def describe(error: ValidationError, source: YamlSource, root: type) -> ConfigError:
    """One error that names every problem which pydantic found."""
    problems = []
    broken = _broken_rules(YamlSource.read(source.path).values, source.values, root)
    for item in error.errors():
        found = _found(item)
        location = _location(found)
        elsewhere = _sections_with(root, str(found[-1])) if found else []
        sentence = _sentence(location, item, _keys_at(root, found[:-1]), elsewhere)
        # A rule over several keys is told of their section, though it was broken by typing one.
        typed = item["type"] == "value_error" and location not in broken
        problems.append(f"  {TYPED if typed else source.place(location)}: {sentence}")
    unique = list(dict.fromkeys(problems))
    return ConfigError(
        "\n".join([f"{amount(len(unique), 'problem')} in the configuration:", *unique]),
        "correct the values; docs/config.md lists every key",
    )


def _found(item: Any) -> Location:
    """Where pydantic found a problem, without the kind that it puts behind the path where several
    kinds of value are allowed.
    """
    return tuple(part for part in item["loc"] if part not in {"", "str", "list[str]"})


def _location(found: Location) -> Location:
    """... without the name of the method, which is such a kind too, behind `method`."""
    return found[:1] + found[2:] if found[:1] == ("method",) else found


def _broken_rules(values: dict[str, Any], merged: dict[str, Any], root: type) -> set[Location]:
    """The sections of which the values of a file break a rule by themselves.

    pydantic comes to a rule only where all values below it are sound. So what the file lacks, or
    has wrong, is taken from where all overrides are applied.
    """
    for item in _faults(values, root):
        _take(_location(_found(item)), merged, values)
    faults = _faults(values, root)
    return {_location(_found(item)) for item in faults if item["type"] == "value_error"}


def _faults(values: dict[str, Any], root: type) -> list[Any]:
    try:
        TypeAdapter(root).validate_python(values)
    except ValidationError as error:
        return list(error.errors())
    return []


def _take(location: Location, merged: Any, values: Any) -> None:
    """One value, which is no section, from `merged` into `values`, where both have its section."""
    for part in location[:-1]:
        merged, values = (v.get(part) if isinstance(v, dict) else None for v in (merged, values))
    found = merged.get(location[-1]) if location and isinstance(merged, dict) else None
    if isinstance(values, dict) and found is not None and not isinstance(found, dict):
        values[location[-1]] = found


def _sentence(location: Location, item: Any, known: list[str], elsewhere: list[str]) -> str:
    name = dotted(location) or "the configuration"
    if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        here = [dotted((*location[:-1], key)) for key in close]
        near = [key for key in elsewhere if key != name] or here
        hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
        return f"{name} is not a known key; {hint}"
    if item["type"] == "union_tag_invalid":
        known = re.findall(r"'(\w+)'", item["ctx"]["expected_tags"])
        near = difflib.get_close_matches(item["ctx"]["tag"], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
        return f"{name}.name: there is no method {item['ctx']['tag']!r}; {hint}"
    if item["type"] in {"missing", "missing_argument"}:
        return f"{name} is missing"
    if item["type"] == "value_error":
        return f"{name}: {item['ctx']['error']}" if location else str(item["ctx"]["error"])
    plain = PLAIN.get(item["type"], "").format(**item.get("ctx", {}))
    said = plain or f"{item['msg'][:1].lower()}{item['msg'][1:]}"
    return f"{name}: {said}, found {Excerpt().repr(item['input'])}"


def _sections_with(root: type, name: str) -> list[str]:
    """Dotted paths of the sections' keys of this name: `epochs` is `train.epochs`."""
    sections = [field for field in _keys_at(root, ()) if name in _keys_at(root, (field,))]
    return [f"{section}.{name}" for section in sections]


def _keys_at(root: type, location: Location) -> list[str]:
    """The names of the fields of the dataclass at `location` below `root`."""
    kinds: list[Any] = [root]
    for part in location:
        named = [kind for kind in kinds if getattr(kind, "name", None) == part]
        if named:  # one of several dataclasses that are told apart by their `name`
            kinds = named
            continue
        hints = typing.get_type_hints(kinds[0])
        if part not in hints:
            return []
        several = typing.get_origin(hints[part]) in {typing.Union, types.UnionType}
        options = typing.get_args(hints[part]) if several else [hints[part]]
        kinds = [option for option in options if is_dataclass(option)]
        if not kinds:
            return []
    return [field.name for field in fields(kinds[0])]
