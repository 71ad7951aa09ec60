"""Real processes for tests: one per rank, started together, none left behind."""

import functools
import itertools
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def wait_for(
    condition: Callable[[], object], timeout: float = 120, why: Callable[[], str] = lambda: ""
) -> None:
    """Returns when it holds; AssertionError where that takes longer than so many seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {why()}"
        time.sleep(0.02)


def ends(work: Callable[[], T], timeout: float = 120) -> T:
    """What the work returns or raises; TimeoutError where it hangs, for which nothing waits."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the one who waits
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout)


def connections(server: socket.socket) -> int:
    """How many have asked a server that never answers."""
    server.setblocking(False)
    found = 0
    with suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            found += 1
    return found


def free_port() -> int:
    """A port that nothing listens on, and that no other test here is given before somebody does.

    Two sessions of pytest at once, or more than nine workers, could meet, though rarely.
    """
    for port in _ports():
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("a port that is free can be found for ever")


@functools.cache
def _ports() -> Iterator[int]:
    """Ports below those that systems hand out unasked; each worker of pytest has its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, start = 20_000 + 1000 * (worker % 9), secrets.randbelow(1000)
    return itertools.cycle(first + (start + i) % 1000 for i in range(1000))


PRELOAD = [
    *("timm", "accelerate", "torch._dynamo", "scipy.ndimage", "sklearn.metrics", "pytest"),
    *("kdad_dist.train.loop", "kdad_dist.score.scoring", "kdad_dist.report.page", "tests.kdad"),
]
"""What is slow to import is imported once, in the process that all others are forked from."""


def forks() -> ForkServerContext:
    """Makes processes that have imported PRELOAD."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that runs a function of the top level of a module; the caller ends it."""
    process = forks().Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def run_ranks(
    function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 180
) -> list[Any]:
    """What `function(*arguments)` returns on each rank of a gloo group, by rank.

    Args:
        function: at the top level of a module.
        timeout: seconds until all ranks are killed.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not come to an end.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            start(_rank, function, arguments, rank, processes, folder, timeout)
            for rank in range(processes)
        ]
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        stuck = [i for i, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
            rank.join()
        failures = [file.read_text() for file in sorted(Path(folder).glob("failure_*"))]
        assert not failures, "\n".join(failures)
        assert not stuck, f"ranks {stuck} of {processes} did not end within {timeout} s"
        assert all(rank.exitcode == 0 for rank in ranks), [rank.exitcode for rank in ranks]
        return [torch.load(f"{folder}/result_{i}", weights_only=False) for i in range(processes)]


def _rank(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    rank: int,
    processes: int,
    folder: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*arguments), f"{folder}/result_{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:  # noqa: BLE001 - written down for the parent
        Path(folder, f"failure_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the threads of gloo may wait for the others


def run_command(
    command: Sequence[str],
    processes: int = 1,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command once per rank with the variables that torchrun sets; ends with all of them.

    Raises:
        AssertionError: a rank did not come to an end within `timeout` seconds; all are killed.
    """
    port = str(free_port())
    started = []
    for rank in range(processes):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        started.append(
            subprocess.Popen(
                command,
                env={**os.environ, **variables, **(environment or {})},
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    deadline = time.monotonic() + timeout
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            results.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{command} did not end within {timeout} s") from error
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return results
