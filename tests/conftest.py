"""Fixtures that several tests share."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import warm
from tests.needs import REPOSITORY, require_or_skip
from tests.soak.report import pytest_runtest_logreport, pytest_sessionfinish  # noqa: F401 - hooks


def pytest_configure() -> None:
    """Hears Ctrl-C, which a shell has what it starts in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and weights, where they lie beside the checkout (or where KDAD_SHARED says)."""
    folder = Path(os.environ.get("KDAD_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        require_or_skip(
            "data", f"real data is not at {folder}; set KDAD_SHARED to the folder that holds data/"
        )
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what tests decode out of the user's cache."""
    os.environ["KDAD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """The path of a Python that starts at once (tests/warm.py)."""
    from tests.launcher import forks  # imports torch, which not every test needs

    with TemporaryDirectory(prefix="kdad-warm-") as folder:  # paths of sockets are short
        script, address = Path(folder, "python"), Path(folder, "socket")
        words = shlex.join([sys.executable, "-SEs", warm.__file__, sys.executable, str(address)])
        script.write_text(f'#!/bin/sh\nexec {words} "$0" "$@"\n')
        script.chmod(0o755)
        process = forks().Process(target=warm.serve, args=(str(address),))
        process.start()
        while not address.exists():
            assert process.is_alive()
            time.sleep(0.05)
        yield str(script)
        process.kill()
        process.join()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder that every user may enter and write to, unlike `tmp_path`."""
    with TemporaryDirectory(prefix="kdad-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture
def as_unprivileged() -> Iterator[None]:
    """Runs the test without root's permission to read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
