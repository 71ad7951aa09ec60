"""A launch that stands still: who hangs is named by those who still answer, soon and for good."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from kdad_dist.runtime.watch import Sign, Watch, is_gone, verdict
from tests.launcher import free_port, start, wait_for

SECONDS = 1.0
PATIENCE = timedelta(seconds=120)


def process(rank: int, world: int, port: int, folder: str, habits: tuple[str, ...]) -> None:
    """Lives as its habit says: stopped, behind, works or waits; the store is that of rank 0."""
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=PATIENCE)
    own = TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    watch = Watch(rank, world, own, SECONDS, Path(folder, f"stuck_{rank}").write_text)
    habit = habits[rank]
    wait_for(lambda: len(watch.signs) == world)
    store.set(f"saw all {rank}", "")
    store.wait([f"saw all {other}" for other in range(world)], PATIENCE)
    watch.at(7 if habit == "behind" else 8, f"step {7 if habit == 'behind' else 8}")
    if habit == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    for beat in range(60):
        time.sleep(0.1)
        if habit == "works":
            watch.at(8 + beat, "its work")
    del store
    os._exit(7)


def launch(folder: Path, *habits: str) -> tuple[list[int | None], dict[int, str]]:
    """The exit codes of processes with these habits, and what each has noted."""
    port = free_port()
    ranks = [start(process, r, len(habits), port, str(folder), habits) for r in range(len(habits))]
    try:
        for rank, habit in zip(ranks, habits, strict=True):
            if habit != "stopped":
                rank.join(120)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return codes, {int(file.name[6:]): file.read_text() for file in folder.glob("stuck_*")}


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_is_named_by_the_other(tmp_path, stopped):
    habits = ["waits", "waits"]
    habits[stopped] = "stopped"
    codes, notes = launch(tmp_path, *habits)
    assert codes[1 - stopped] == 1
    assert list(notes) == [1 - stopped]
    assert f"process {stopped} of 2 (pid " in notes[1 - stopped]
    assert "does not answer" in notes[1 - stopped]


def test_a_process_that_lives_but_is_behind_is_named_by_one_for_all(tmp_path):
    codes, notes = launch(tmp_path, "waits", "behind", "waits")
    assert codes == [1, 1, 1]
    assert list(notes) == [0]
    assert "process 1 of 3" in notes[0] and "at step 7" in notes[0]


def test_nobody_is_given_up_while_one_works(tmp_path):
    codes, notes = launch(tmp_path, "waits", "works")
    assert codes == [7, 7]
    assert not notes


def test_a_verdict_names_who_never_came_and_says_when_nobody_stands_out():
    signs = {r: Sign(3, 60.0, 4, "step 4", 10 + r, "node") for r in range(3)}
    assert verdict(signs, set(), 3) == "all 3 processes answer, and are at step 4"
    del signs[1]
    assert "process 1 of 3 does not answer" in verdict(signs, {1}, 3)


def test_a_process_that_has_ended_is_gone_even_before_its_parent_looks():
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: is_gone(child.pid))
    child.wait()
    assert is_gone(child.pid)
    assert not is_gone(os.getpid())
