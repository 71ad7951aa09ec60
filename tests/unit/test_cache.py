"""The node-wide cache: made once, shared, and sound whatever happens to the one who makes it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kdad_dist.data.cache import cache_root, filled_array
from kdad_dist.data.threads import Decoder
from kdad_dist.errors import DataError, Preempted
from kdad_dist.types import Poll
from tests.disks import mounted
from tests.needs import REPOSITORY

SHAPE = (64, 1024)


def fill(array: np.ndarray) -> None:
    array[:] = np.arange(array.size).reshape(array.shape)


def never(_: np.ndarray) -> None:
    raise AssertionError("filled again")


def filled(path: Path, fill=fill) -> np.ndarray:
    return filled_array(path, SHAPE, np.int32, fill, "numbers")


def is_right(array: np.ndarray) -> bool:
    return np.array_equal(array.ravel(), np.arange(64 * 1024))


@pytest.fixture
def start(warm_python: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process; its arguments are those of `started` behind the first."""
    return partial(started, warm_python)


def started(python: str, code: str, path: Path) -> subprocess.Popen[str]:
    """A process with `path` and the names above at hand."""
    head = "import sys, time; from pathlib import Path; from tests.unit.test_cache import *\n"
    return subprocess.Popen(
        [python, "-c", head + "path = Path(sys.argv[1])\n" + code, str(path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], word: str = "") -> str:
    """Sends a line (where given) and returns the answer."""
    assert process.stdin and process.stdout
    if word:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_an_array_is_filled_once_and_found_again(tmp_path: Path):
    assert is_right(filled(tmp_path / "a"))
    again = filled(tmp_path / "a", never)
    assert is_right(again) and not again.flags.writeable


def test_nothing_is_left_of_a_fill_that_fails(tmp_path: Path):
    def fails(array: np.ndarray) -> None:
        array[0] = 1
        raise DataError("tile/003 is damaged", "pack again")

    with pytest.raises(DataError, match="tile/003"):
        filled(tmp_path / "a", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    assert is_right(filled(tmp_path / "a"))


@pytest.mark.parametrize("damage", ["manifest", "shape", "size", "none"])
def test_a_cache_whose_manifest_does_not_verify_is_made_again(tmp_path: Path, damage: str):
    filled(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    match damage:
        case "manifest":
            manifest.write_text("{")
        case "shape":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"shape": [1]}))
        case "size":
            os.truncate(tmp_path / "a" / "data", 100)
        case "none":
            manifest.unlink()
    assert is_right(filled(tmp_path / "a"))


def test_a_kill_while_filling_leaves_nothing_that_is_trusted(tmp_path: Path, start):
    code = """
def slow(array):
    array[:32] = 7
    print("half", flush=True)
    time.sleep(60)
filled(path, slow)
"""
    process = start(code, tmp_path / "a")
    assert ask(process) == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "a.partial").exists()
    assert is_right(filled(tmp_path / "a"))
    assert not (tmp_path / "a.partial").exists()


def test_of_two_processes_one_fills_and_the_other_waits_for_it(tmp_path: Path, start):
    code = """
def slow(array):
    print("filling", flush=True)
    time.sleep(0.5)
    fill(array)
print(is_right(filled(path, slow)), flush=True)
"""
    both = [start(code, tmp_path / "a") for _ in range(2)]
    answers = sorted(process.communicate()[0].split() for process in both)
    assert answers == [["True"], ["filling", "True"]]


def test_a_waiting_process_takes_over_when_the_other_is_killed(tmp_path: Path, start):
    slow = "print(1, flush=True); time.sleep(60)"
    first = start(f"filled(path, lambda array: exec({slow!r}))", tmp_path / "a")
    assert ask(first) == "1"
    second = start("print(is_right(filled(path)), flush=True)", tmp_path / "a")
    time.sleep(0.3)
    first.kill()
    assert ask(second) == "True"
    first.wait()
    second.wait()


def test_a_full_disk_is_an_error_before_anything_is_computed(tmp_path: Path, start):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    filled(path, never)
except DataError as error:
    print(str(error).replace(chr(10), " "), flush=True)
"""
    process = start(code, tmp_path / "a")
    message = process.communicate()[0]
    assert "numbers needs 0.2 MiB" in message and "KDAD_CACHE" in message and "none" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_a_small_file_system_that_is_full_is_told_with_its_remedy(tmp_path: Path):
    full = pytest.raises(DataError, match=r"needs 0.2 MiB in .*No space left")
    with mounted(tmp_path, "128k"), full:
        filled(tmp_path / "a", never)


def test_a_folder_that_cannot_be_written_is_told_with_its_remedy(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="KDAD_CACHE"):
        filled(tmp_path / "file" / "a")


def test_the_share_of_memory_does_not_grow_with_the_number_of_processes(tmp_path: Path, start):
    code = """
array = filled_array(path, (64 << 20,), np.uint8, never, "bytes")
print(int(array[::4096].sum()), flush=True)
sys.stdin.readline()
rollup = Path("/proc/self/smaps").read_text().split("/a/data")[1]
print(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")), flush=True)
sys.stdin.readline()
"""

    def ones(array: np.ndarray) -> None:
        array[:] = 1

    filled_array(tmp_path / "a", (64 << 20,), np.uint8, ones, "bytes")
    readers = [start(code, tmp_path / "a") for _ in range(2)]
    assert [ask(reader) for reader in readers] == ["16384"] * 2
    share = sum(int(ask(reader, "measure")) for reader in readers)
    for reader in readers:
        reader.communicate("end\n")
    assert share == pytest.approx(64 << 10, rel=0.02)  # KiB, over both processes


def test_the_place_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("KDAD_CACHE", "/scratch/kdad")
    assert cache_root() == Path("/scratch/kdad")
    monkeypatch.setenv("KDAD_CACHE", "")
    assert cache_root().parts[-2:] == (".cache", "kdad_dist")


def leave(done: int = 0) -> None:
    raise Preempted("asked to stop", "start again")


def test_who_waits_for_another_process_that_fills_may_leave(tmp_path: Path, start):
    slow = "print(1, flush=True); time.sleep(60)"
    first = start(f"filled(path, lambda array: exec({slow!r}))", tmp_path / "a")
    assert ask(first) == "1"
    with pytest.raises(Preempted):
        filled_array(tmp_path / "a", SHAPE, np.int32, never, "numbers", leave)
    first.kill()
    first.wait()


def test_a_fill_that_is_left_leaves_nothing(tmp_path: Path):
    decoder = Decoder(lambda number: np.full((4, 4, 3), number, np.uint8), 4)

    def images(poll: Poll) -> np.ndarray:
        return filled_array(
            tmp_path / "a", (9, 4, 4, 3), np.uint8, lambda a: decoder.into(a, range(9), poll), "n"
        )

    with pytest.raises(Preempted):
        images(leave)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    decoded = []
    assert images(lambda done=0: decoded.append(done))[8, 0, 0, 0] == 8
    assert sum(decoded) == 9
