"""`kdad` as real processes, started the way torchrun starts them, but without its slow imports."""

import importlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdad_dist.runtime.stopping import LOOK_EVERY, Stop
from kdad_dist.status.survey import look
from tests.helpers import make_classes, make_mvtec
from tests.launcher import forks, free_port, wait_for
from tests.needs import REPOSITORY

MODES = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(
                REPOSITORY / f"launch/deepspeed/zero{stage}.json"
            ),
        }
        for stage in (1, 2, 3)
    },
}
"""What `accelerate launch` puts into the environment for the files below launch/accelerate."""

GRACE = 30.0
"""Seconds that launchers give those whom a process that failed has left, before they kill them."""


@dataclass
class Outcome:
    codes: list[int]
    text: str
    """What all ranks printed, on stdout and stderr."""


class Launched:
    """The ranks of one command, running."""

    def __init__(
        self,
        words: Sequence[object],
        processes: int,
        first: Callable[[], None] | None = None,
        mode: str = "ddp",
    ) -> None:
        """Args:
        first: of the top level of a module; called in each rank before the command.
        mode: one of MODES; but for ddp, one process is launched too.
        """
        context = forks()
        self.folder = tempfile.TemporaryDirectory()
        port = free_port()
        self.ranks = [
            context.Process(
                target=_rank,
                args=(
                    [str(w) for w in words],
                    rank,
                    processes,
                    port,
                    self.folder.name,
                    first,
                    mode,
                    dict(os.environ),
                ),
            )
            for rank in range(processes)
        ]
        for rank in self.ranks:
            rank.start()

    def kill(self, number: int = signal.SIGKILL, *, only: int | None = None) -> None:
        """Sends a signal to all ranks that live, or to one of them."""
        for rank in self.ranks if only is None else [self.ranks[only]]:
            with suppress(ProcessLookupError):  # it has just ended
                if rank.is_alive() and rank.pid:
                    os.kill(rank.pid, number)

    def wait(self, timeout: float = 300, grace: float = GRACE) -> Outcome:
        """The outcome; as a launcher does, ends the other ranks when one has failed.

        Args:
            grace: seconds that the others have to end by themselves.
        """
        deadline = time.monotonic() + timeout
        end = deadline
        while any(rank.is_alive() for rank in self.ranks):
            if any(rank.exitcode not in (None, 0, 75) for rank in self.ranks):
                end = min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.02)
        files = sorted(Path(self.folder.name).glob("rank_*"))
        text = "\n".join(f"[{file.name}]\n{file.read_text(errors='replace')}" for file in files)
        assert time.monotonic() < deadline, f"not finished within {timeout} s:\n{text}"
        return Outcome([rank.exitcode or 0 for rank in self.ranks], text)


def kdad(
    *words: object,
    processes: int = 1,
    timeout: float = 300,
    first: Callable[[], None] | None = None,
    mode: str = "ddp",
) -> Outcome:
    """Runs `kdad WORDS` on so many processes, to its end."""
    return Launched(words, processes, first, mode).wait(timeout)


def succeeds(*words: object, processes: int = 1, mode: str = "ddp") -> Outcome:
    """As `kdad`, for commands that must not fail."""
    outcome = kdad(*words, processes=processes, mode=mode)
    assert outcome.codes == [0] * processes, outcome.text
    return outcome


def stops(*words: object, processes: int = 1, mode: str = "ddp") -> int:
    """Runs `kdad train WORDS` until its time is over, amid its steps; after which one that was."""
    words = (*words, "train.max_time=1e-9", "train.check_every=1")
    outcome = kdad(*words, processes=processes, mode=mode, first=_comes_to_train)
    assert outcome.codes == [75] * processes, outcome.text
    [step] = set(re.findall(r"stopped after step (\d+) of", outcome.text)) or [outcome.text]
    return int(step)


def _comes_to_train() -> None:
    """Has a training look at its time only when it has begun to take steps."""
    Stop.check = lambda self: None


def configured(folder: Path, config: dict[str, Any], size: int) -> Path:
    """A YAML file in the folder, with 20 images of a texture packed for it at `size` pixels, or 10
    of each of its classes.
    """
    if classes := config["data"].get("classes"):
        make_classes(folder / "images", tuple(sorted(classes)))
    else:
        make_mvtec(folder / "images", train=20, good=3, scratch=4)
    succeeds("pack", folder / "images", folder / "shards", "--size", size)
    path = folder / f"{config['name']}.yaml"
    data = {**config["data"], "shards": str(folder / "shards")}
    path.write_text(yaml.safe_dump({**config, "data": data}))
    return path


def lines(run: Path, name: str = "loss") -> dict[int, float]:
    """What a run wrote down of a number, by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


def exported(run: Path) -> Path:
    """The file of the weights of a run's last checkpoint."""
    succeeds("export", run, "score.checkpoint=last")
    return run / "export/student.safetensors"


def weights(run: Path) -> bytes:
    """Those of the last checkpoint: the same bytes where every bit of them is the same."""
    return exported(run).read_bytes()


def until(launched: Launched, condition: Callable[[], bool], timeout: float = 300) -> None:
    """Waits for something that the ranks do; the death of one that has not is an error."""

    def seen() -> bool:
        alive = all(rank.is_alive() for rank in launched.ranks)  # asked first: it may do so and end
        if condition():
            return True
        assert alive, launched.wait().text
        return False

    try:
        wait_for(seen, timeout)
    except BaseException:
        launched.kill()
        raise


@contextmanager
def standing_still(run: Path) -> Iterator[None]:
    """Keeps a training from ending before the block does; then it looks for a request at once."""
    training = int((look(run, content=False).process or "").split()[1])
    os.kill(training, signal.SIGSTOP)
    try:
        yield
        time.sleep(LOOK_EVERY)
    finally:
        with suppress(ProcessLookupError):
            os.kill(training, signal.SIGCONT)


def as_nobody() -> None:
    """Gives up root's permission to read and write everything; for `first`."""
    # Where Python itself belongs to root, nothing can be imported afterwards.
    for module in (
        *("train.loop", "score.scoring", "predict", "report.page"),
        *("export.write", "export.weights"),
        *("data.writer", "data.verify"),
    ):
        importlib.import_module(f"kdad_dist.{module}")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def limit_files(size: int) -> None:
    """No file may become larger, in bytes, which stands in for a full disk; for `first`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _rank(
    words: list[str],
    rank: int,
    processes: int,
    port: int,
    folder: str,
    first: Callable[[], None] | None,
    mode: str,
    environment: dict[str, str],
) -> None:
    output = os.open(f"{folder}/rank_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()  # what was set when the server of forks started
    os.environ |= environment | MODES[mode] | {"OMP_NUM_THREADS": "1"}
    if processes > 1 or mode != "ddp":
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch
    from huggingface_hub import constants

    torch.set_num_threads(1)
    constants.HF_HUB_OFFLINE = "HF_HUB_OFFLINE" in environment  # read when it was imported
    from kdad_dist.cli.app import main

    sys.argv = ["kdad", *words]
    if first is not None:
        first()
    main()
