"""Kinds of values that a configuration may hold, with their limits."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

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


Address = Annotated[str, AfterValidator(_without_password)]
