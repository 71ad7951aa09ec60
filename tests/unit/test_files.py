"""A lock that keeps others out while its process lives, and not a moment longer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdad_dist import files
from kdad_dist.errors import UsageError
from tests.needs import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from kdad_dist import files
with files.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_dies_with_its_process_and_names_it_before(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"pid {holder.pid} on"), files.exclusive(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGSTOP)  # as a process that hangs
        with pytest.raises(UsageError), files.exclusive(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    os.utime(tmp_path / files.LOCK, (2**33, 2**33))  # a file of the future, by this clock
    with files.exclusive(tmp_path):
        pass
