"""Small file systems, which are full soon."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

GUARD = """
mount -t tmpfs -o "size=$2" tmpfs "$1" || exit
echo mounted
read -r _
umount --lazy "$1"
"""


@contextmanager
def mounted(place: Path, size: str) -> Iterator[None]:
    """Has a file system of this size at a place, which is gone however the block, or this whole
    process, ends; skips the test where this machine does not let us mount one.
    """
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "guard", str(place), size],
        stdin=subprocess.PIPE,  # which ends with this process
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert guard.stdout
    if guard.stdout.readline() != "mounted\n":
        pytest.skip(f"no small file system may be mounted here: {guard.communicate()[1]}")
    try:
        yield
    finally:
        _, trouble = guard.communicate()
        assert guard.returncode == 0, trouble


def resize(place: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
