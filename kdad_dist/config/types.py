"""Kinds of values that a configuration may hold, with their limits."""

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# YAML 1.1 reads an unquoted `no` as false.
NO = BeforeValidator(lambda v: "no" if v is False else v)
# A class may be called 3, which YAML reads as a number.
Name = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v)]


def _without_password(address: str) -> str:
    if re.match(r"\w+://[^/]*@", address):
        raise ValueError(
            "an address with a name or password in it would be written into every run; "
            "serve the shards without one, or copy them"
        )
    return address


def _one_folder(name: str) -> str:
    if name in {".", ".."} or "/" in name or "\0" in name:
        raise ValueError(
            "a run's name is that of one folder in runs/: without a slash, and not . or ..; "
            "`output` takes a path"
        )
    return name


FolderName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_folder)]
Address = Annotated[str, AfterValidator(_without_password)]


@dataclass(frozen=True, config=CHECKED)
class MethodSection:
    """What the `method` section of each method says of itself."""

    READING: ClassVar[tuple[str, ...]] = ()
    """Keys that decide how a trained student is read, and not what is trained."""
    COSTS: ClassVar[tuple[str, ...]] = ()
    """Keys that change what training costs, and not what comes out."""
    SAME_LOSS: ClassVar[tuple[str, ...]] = ()
    """Keys that change neither what is learnt nor by which loss, but who learns it."""

    @property
    def draws_to_read(self) -> bool:
        """Whether the run's seed decides how a trained student is read."""
        return False
