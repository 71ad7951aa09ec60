"""A launch that stands still: who hangs is named by those who still answer, soon and for good."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from kdad_dist.runtime.watch import Sign, Watch, is_gone, verdict
from tests.launcher import free_port, start, wait_for

PATIENCE = timedelta(seconds=120)


def process(rank: int, port: int, folder: str, stopped: int) -> None:
    """One of two; waits once both were seen, or is stopped. The store is that of rank 0."""
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=PATIENCE)
    own = TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    watch = Watch(rank, 2, own, 1.0, Path(folder, f"stuck_{rank}").write_text)

    def saw(*ranks: int) -> bool:
        watch.at(7, "the start")  # however long the other takes to come
        return len(watch.signs) == 2 and store.check([f"saw {other}" for other in ranks])

    wait_for(saw)
    store.set(f"saw {rank}", "")
    wait_for(lambda: saw(0, 1))
    watch.at(8, "step 8")
    if rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)  # as in a collective; the watch ends it
    os._exit(7)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_is_named_by_the_other(tmp_path, stopped):
    port = free_port()
    ranks = [start(process, rank, port, str(tmp_path), stopped) for rank in range(2)]
    try:
        ranks[1 - stopped].join(120)
        assert ranks[1 - stopped].exitcode == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    [note] = tmp_path.glob("stuck_*")
    assert note.name == f"stuck_{1 - stopped}"
    assert f"process {stopped} of 2 (pid " in note.read_text()
    assert "does not answer" in note.read_text()


class ByHand(Watch):
    """Has no threads: its rounds are those of the test."""

    def _talk(self) -> None: ...

    def _mind_the_store(self) -> None: ...


class Ended(Exception):
    """In place of the end of a process."""


class Launch:
    """Processes whose rounds are taken in turns, by a clock that stands still meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
        self.now, self.steps = 0.0, [0] * world
        self.codes: dict[int, int] = {}
        self.notes: dict[int, str] = {}
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(os, "_exit", self._exit)
        store = HashStore()
        self.watches = [
            ByHand(
                rank, world, store, 1800, lambda text, rank=rank: self.notes.update({rank: text})
            )
            for rank in range(world)
        ]

    def _exit(self, code: int) -> None:
        raise Ended(code)

    def go(self, rounds: int, works: set[int], stopped: set[int] = frozenset()) -> None:
        """So many rounds of all processes but those that are stopped or have ended."""
        for _ in range(rounds):
            self.now += self.watches[0].interval
            for rank, watch in enumerate(self.watches):
                if rank in self.codes or rank in stopped:
                    continue
                if rank in works:
                    self.steps[rank] += 1
                    watch.at(self.steps[rank], f"step {self.steps[rank]}")
                try:
                    watch.mind()
                    watch.tell()
                except Ended as end:
                    [self.codes[rank]] = end.args


EVERYBODY = {0, 1, 2}


@pytest.mark.parametrize(("stopped", "speaker"), [(0, 1), (1, 0), (2, 0)])
def test_who_is_silent_is_named_by_the_first_of_the_others(monkeypatch, stopped, speaker):
    launch = Launch(monkeypatch, 3)
    launch.go(3, EVERYBODY)
    launch.go(200, set(), {stopped})
    assert launch.codes == dict.fromkeys(EVERYBODY - {stopped}, 1)
    [(rank, note)] = launch.notes.items()
    assert rank == speaker
    assert f"process {stopped} of 3 (pid " in note
    assert "last seen at step 3, does not answer" in note


def test_a_process_that_lives_but_is_behind_is_named_by_one_for_all(monkeypatch):
    launch = Launch(monkeypatch, 3)
    launch.go(7, EVERYBODY)
    launch.go(1, {0, 2})
    launch.go(200, set())
    assert launch.codes == dict.fromkeys(EVERYBODY, 1)
    assert list(launch.notes) == [0]
    assert "process 1 of 3" in launch.notes[0] and "at step 7" in launch.notes[0]


def test_nobody_is_given_up_while_one_works(monkeypatch):
    launch = Launch(monkeypatch, 2)
    launch.go(1, {0, 1})
    launch.go(500, {1})
    assert not launch.codes


def test_a_launch_that_was_paused_as_a_whole_blames_nobody(monkeypatch):
    launch = Launch(monkeypatch, 3)
    launch.go(3, EVERYBODY)
    launch.now += 24 * 3600
    launch.go(50, set())  # the first step takes its time
    launch.go(1, {1})
    launch.go(50, set())
    assert not launch.codes
    launch.go(100, set())
    assert launch.codes == dict.fromkeys(EVERYBODY, 1)


def test_a_store_that_is_gone_ends_who_waits_and_leaves_the_reason_to_those_who_know(monkeypatch):
    class Gone(HashStore):
        def set(self, *_: object) -> None:
            raise RuntimeError

    launch = Launch(monkeypatch, 2)
    launch.go(3, {0, 1})
    launch.watches[1]._store = Gone()
    launch.go(200, set(), {0})
    assert launch.codes == {1: 1} and not launch.notes


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
