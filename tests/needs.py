"""What tests may need from outside: a browser, shellcheck, SLURM, real data."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def require_or_skip(what: str, reason: str) -> NoReturn:
    """Skips the test for want of `what`, or fails it where KDAD_REQUIRE says that it is there.

    Args:
        what: "browser", "shellcheck", "compiler", "slurm", "netns" or "data"; KDAD_REQUIRE is a
            list of them, with commas.
    """
    if what in os.environ.get("KDAD_REQUIRE", "").split(","):
        pytest.fail(f"KDAD_REQUIRE promises {what}: {reason}")
    pytest.skip(reason)
