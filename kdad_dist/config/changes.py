"""Which keys of a configuration decide the weights that come out, and which are free to change."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kdad_dist.config.data import DataConfig as DataConfig
from kdad_dist.config.load import plain
from kdad_dist.config.run import RunConfig

FREE_TO_CHANGE = ("name", "output", "checkpoint", "score", "track")
"""Sections that do not change what is trained."""
FREE_KEYS = {
    # Shards may move: the fingerprint of their content stands in every checkpoint.
    "data": ("cache", "shards"),
    "train": ("log_every", "check_every", "max_time", "timeout_minutes", "changed_config"),
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def trained_with(config: RunConfig) -> dict[str, Any]:
    """The dotted keys that decide which weights come out, and their values."""
    values = plain(config)
    for section in FREE_TO_CHANGE:
        values.pop(section)
    for section, keys in FREE_KEYS.items():
        for key in keys:
            values[section].pop(key)
    for key in config.method.READING + config.method.COSTS:
        values["method"].pop(key)
    return dict(flatten(values))


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys that differ and would change what is trained, with both values."""
    before, after = trained_with(old), trained_with(new)
    return [
        f"{key}: {before.get(key)!r} in the run, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def digest(config: RunConfig) -> str:
    """Short hash of everything that decides the weights."""
    text = json.dumps(trained_with(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
