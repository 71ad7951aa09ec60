"""Many hostile inputs: a few in every test run, the same ones; many and new ones in `make soak`."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdad_dist.errors import KdadError

FEW, MANY = 40, 2000
fuzzed = pytest.mark.parametrize(
    "examples", [FEW, pytest.param(MANY, marks=pytest.mark.soak)], ids=["few", "many"]
)
"""For a test that hands its argument `examples` to `survives`."""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", ".", "..", "/", "../../x", "/etc/passwd", "a\0b", "pipe:touch x", "%2e"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
"""Anything that JSON can hold."""


def survives(examples: int, check: Callable[[Any], object], inputs: st.SearchStrategy) -> None:
    """Raises whatever `check` raises of some input that is no error for the user."""

    @settings(
        max_examples=examples,
        derandomize=examples == FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(found: Any) -> None:
        try:
            check(found)
        except KdadError as error:
            assert error.problem and error.remedy

    run()


def altered(whole: Any) -> st.SearchStrategy:
    """The same document with something else in one or two places, or without it."""
    places = list(paths(whole))

    @st.composite
    def change(draw: st.DrawFn) -> Any:
        document = deepcopy(whole)
        for *parents, last in draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
            inner = document
            for step in parents:
                inner = inner[step] if isinstance(inner, dict | list) and has(inner, step) else None
            if not has(inner, last):
                continue
            if isinstance(inner, dict) and draw(st.booleans()):
                del inner[last]
            else:
                inner[last] = draw(values)
        return document

    return change()


def has(container: Any, step: str | int) -> bool:
    if isinstance(container, list):
        return isinstance(step, int) and step < len(container)
    return isinstance(container, dict) and step in container


def paths(document: Any) -> Iterator[tuple[str | int, ...]]:
    """Where everything in it stands."""
    inner = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for step, value in inner:
        yield (step,)
        yield from ((step, *rest) for rest in paths(value))
