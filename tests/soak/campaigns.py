"""Campaigns against a training and its files; the suite runs short ones, `make soak` long ones."""

import hashlib
import json
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from kdad_dist.config.load import load_run
from kdad_dist.data.index import Index
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.verify import verify as verify_shards
from kdad_dist.errors import CheckpointError, DataError
from kdad_dist.methods import build_method
from kdad_dist.runtime.manifest import verify
from kdad_dist.runtime.saved import Checkpoints
from kdad_dist.runtime.tensors import Tensors
from tests.kdad import Launched, lines, weights
from tests.launcher import wait_for
from tests.methods import weights_hash
from tests.needs import REPOSITORY
from tests.tiny import tiny

CONFIG = tiny(
    "stfpm",
    optim={"weight_decay": 1.0e-4},
    train={"steps": 24},
    checkpoint={"every_steps": 3, "keep": 2},
)
PROCESSES = 2


# ---- kills ---------------------------------------------------------------------------------------


class Watcher:
    """Verifies every directory that ever stands under the name of a checkpoint."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"
        self.seen: set[tuple[str, int]] = set()
        self.faults: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.look()

    def look(self) -> None:
        for path in self.folder.glob("step_*"):
            try:
                me = path.name, path.stat().st_ino
                if me in self.seen:
                    continue
                verify(path)
                self.seen.add(me)
            except FileNotFoundError:
                continue  # deleted meanwhile, which renames it first
            except CheckpointError as error:
                if path.exists() and path.stat().st_ino == me[1]:
                    self.faults.append(str(error))


@dataclass
class Kills:
    """What a campaign of kills saw."""

    victims: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    checkpoints: int = 0
    """Different directories that the watcher verified."""
    faults: list[str] = field(default_factory=list)
    left: int = 0
    """Steps that the last start, which nobody killed, had to take."""


def kill(
    config: Path,
    run: Path,
    kills: int,
    seed: int,
    launchers: int,
    steps: int,
    processes: int = PROCESSES,
) -> Kills:
    """Kills a training so many times, then lets it come to its end.

    Args:
        launchers: how many of the kills hit the launcher instead of its processes.
    """
    draw, found, watcher = random.Random(seed), Kills(), Watcher(run)
    words = ["train", config, f"output={run}", f"train.steps={steps}"]
    hits_launcher = set(draw.sample(range(kills), launchers))
    with watcher.watching():
        for number in range(kills):
            moment = draw.choice(["start", "step", "save"])
            if number in hits_launcher:
                victim = "launcher"
                kill_launcher(words, processes, lambda moment=moment: reached(run, moment, draw))
            else:
                victim = draw.choice([*(f"rank {rank}" for rank in range(processes)), "all"])
                launched = Launched(words, processes)
                reached(run, moment, draw)
                for rank in range(processes):
                    if victim in ("all", f"rank {rank}"):
                        launched.ranks[rank].kill()
                launched.wait(grace=0.5)
            found.victims[victim] += 1
            found.moments[moment] += 1
        newest = max(run.glob("checkpoints/step_*"), default=Path("step_0"))
        found.left = steps - int(newest.name.removeprefix("step_"))
        assert found.left > 0, "the training ended before the kills did: give it more steps"
        finish(words, processes)
    found.checkpoints, found.faults = len(watcher.seen), watcher.faults
    return found


def finish(words: list[object], processes: int = PROCESSES) -> None:
    outcome = Launched(words, processes).wait(timeout=900)
    assert outcome.codes == [0] * processes, outcome.text


def reached(run: Path, moment: str, draw: random.Random) -> None:
    """Returns at a random moment of a start, or of its steps, or of its saves."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 60

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    def saving() -> bool:
        return bool(list(run.glob("checkpoints/.step_*")))

    before = size()
    if moment == "start":
        end = time.monotonic() + draw.uniform(0, 2.5)
        while time.monotonic() < end and size() <= before:  # it ends with the first step
            time.sleep(0.002)
        return
    while size() <= before and time.monotonic() < deadline:
        time.sleep(0.002)
    if moment == "step":
        start, steps = taken(log), draw.randint(1, 12)
        while taken(log) < start + steps and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        return
    while not saving() and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.03))


def taken(log: Path) -> int:
    """Lines of metrics.jsonl, which are a few more than steps."""
    return log.read_bytes().count(b"\n")


def kill_launcher(words: list[object], processes: int, wait: Callable[[], None]) -> None:
    """Kills the launcher of a training, and waits until those that it leaves behind have ended."""
    own = {"KDAD_PROCESSES": str(processes), "KDAD_PYTHON": sys.executable}
    mark = f"KDAD_TEST={secrets.token_hex(8)}".encode()
    own |= dict([mark.decode().split("=")])
    launcher = subprocess.Popen(
        [str(REPOSITORY / "launch/train.sh"), *map(str, words[1:])],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait()
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: not any(mark in variables(process) for process in running()))


def running() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def variables(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return b""


def same_training(run: Path, undisturbed: Path) -> None:
    """A run ended as another one did: weights to the bit, each step in the log once, finished."""
    assert weights(run) == weights(undisturbed)
    for name in ("loss", "val_loss"):
        assert lines(run, name) == lines(undisturbed, name)
    taken = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [record["step"] for record in taken if "loss" in record]
    assert steps == [*range(1, max(steps) + 1)]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


# ---- flipped bits and truncated files ------------------------------------------------------------


@dataclass
class Damages:
    """What a campaign of damages saw: how often each kind of file was hit, and what came of it."""

    hits: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)


def damage(run: Path, shards: Path, flips: int, truncations: int, seed: int) -> Damages:
    """Flips single bits and cuts files of checkpoints and shards, one at a time.

    Raises:
        AssertionError: a damage was not told, or damaged bytes were used.
    """
    draw, found = random.Random(seed), Damages()
    student = build_method(load_run(run)).student
    sources = {
        "checkpoint": ([p for p in run.glob("checkpoints/step_*/*") if p.is_file()], run),
        "shard": ([p for p in shards.iterdir() if p.suffix in {".tar", ".json", ".jsonl"}], shards),
    }
    pixels = read_all(shards)
    for number in range(flips + truncations):
        kind = draw.choice([*sources])
        files, folder = sources[kind]
        file = draw.choice(sorted(files))
        content = file.read_bytes()
        if number < flips:
            position = draw.randrange(8 * len(content))
            spoilt = bytearray(content)
            spoilt[position // 8] ^= 1 << position % 8
        else:
            spoilt = content[: draw.randrange(len(content))]
        file.write_bytes(spoilt)
        try:
            if kind == "checkpoint":
                outcome = falls_back(run, file, student)
            else:
                outcome = refuses(folder, pixels)
        finally:
            file.write_bytes(content)
        name = file.name if kind == "checkpoint" else file.suffix
        found.hits[f"{kind}: {'*.distcp' if name.endswith('distcp') else name}"] += 1
        found.outcomes[f"{kind} {outcome}"] += 1
    return found


def falls_back(run: Path, file: Path, student: nn.Module) -> str:
    """Neither the newest nor the best checkpoint is a damaged one, and none of it is loaded."""
    finder = Checkpoints(run / "checkpoints")
    newest = max((run / "checkpoints").glob("step_*"))
    chosen, before = finder.latest(), weights_hash(student)
    assert file.parent not in (chosen, finder.best())
    with pytest.raises(CheckpointError, match="damaged|there is no checkpoint"):
        finder.load(file.parent, Tensors(student))
    assert weights_hash(student) == before
    if file.parent != newest:
        return "refused when named"
    assert chosen is not None, "there was another one"
    return "passed over for the one before it"


def read_all(shards: Path) -> bytes:
    """A hash of all pixels and masks, each of whose bytes was checked before it was decoded."""
    digest, reader = hashlib.sha256(), ShardReader(str(shards), CONFIG["data"]["image_size"])
    for sample in Index.read(str(shards)).samples:
        digest.update(reader.image(sample).tobytes())
        digest.update(reader.mask(sample).tobytes())
    return digest.digest()


def refuses(shards: Path, pixels: bytes) -> str:
    """`kdad verify` names every damage; reading refuses all that lies in bytes that it uses."""
    assert verify_shards(str(shards)), "a damaged shard folder was called sound"
    try:
        assert read_all(shards) == pixels, "damaged bytes were used"
    except DataError:
        return "refused when read"
    return "in bytes that reading never uses (headers and padding of a tar), named by `kdad verify`"
