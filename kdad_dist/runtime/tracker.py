"""Where the numbers of a training go: `metrics.jsonl` always, other trackers where asked for.

`metrics.jsonl` is the truth. The others are told what it says, and whatever befalls them is a
warning: no training stops for want of a tracker, or waits for one.

```
metrics.jsonl
tensorboard/             event files, one from each start
wandb_id                 the one identity of the run at W&B, over all its starts
wandb_sent.json          the last step that stands in a part, and that part's name
wandb/offline-run-*-ID/  a part: what one start had to say; no two have a step in common
.wandb.*.partial/        a part being written; one that was killed is deleted, and said again
```
"""

import importlib.util
import json
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import numpy as np
import psutil
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from kdad_dist import files
from kdad_dist.config.load import plain
from kdad_dist.config.run import RunConfig, TrackConfig
from kdad_dist.errors import UsageError
from kdad_dist.runtime.rundir import LOG_FILE, scores_folder
from kdad_dist.runtime.session import Session

log = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds that a tracker may take to note what is left, when all else is done."""
SYNC = "`wandb sync` of what is in the run's folder wandb/ sends it later"
Metrics = dict[str, float | int]
Rows = Iterator[tuple[int, Metrics]]
"""Steps and what was measured at them; a step may come several times in a row."""


class Tracker:
    """Append-only records of the main process; other processes write nothing."""

    def __init__(self, run: Path, session: Session, config: RunConfig, start_step: int) -> None:
        self.run, self.file, self.others = run, None, list[Aside]()
        if not session.is_main:
            return
        path = run / LOG_FILE
        with files.writing(run):
            keep_until(path, start_step)
            self.file = path.open("a", encoding="utf-8", buffering=1)
        if config.track.tensorboard:
            self.others.append(
                Aside("TensorBoard", lambda rows: tell_tensorboard(run, start_step, rows))
            )
        if config.track.wandb != "disabled":
            wandb = Aside("Weights & Biases", lambda rows: tell_wandb(config, rows))
            self.others.append(wandb)
            for record in records(path):  # of which a killed start may have sent nothing
                wandb.write(record.pop("step"), record)

    def write(self, metrics: Metrics) -> None:
        """Records one line; `metrics["step"]` says where it belongs."""
        if self.file is None:
            return
        # JSON has no infinity: under fp16 the norm of a gradient may well be one.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with files.writing(self.run):
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        for other in self.others:
            other.write(int(metrics["step"]), {k: v for k, v in finite.items() if k != "step"})

    def flush(self) -> None:
        """Puts every line on the disk, lest a checkpoint is ahead of them after a power cut."""
        if self.file is not None:
            with files.writing(self.run):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for other in self.others:
            other.close()


class Aside:
    """Work on rows in a thread of its own; its first failure is a warning, and its end.

    Args:
        work: is given the rows as they come, and ends after the last one.
    """

    def __init__(self, name: str, work: Callable[[Rows], None]) -> None:
        self.name, self._work = name, work
        self._queue: SimpleQueue[tuple[int, Metrics] | None] = SimpleQueue()
        self._given_up = Lock()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float | int | None]) -> None:
        if self._thread.is_alive():
            self._queue.put((step, {k: v for k, v in values.items() if v is not None}))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._give_up(f"it has not come to an end for {PATIENCE:g} s")

    def _run(self) -> None:
        try:
            self._work(iter(self._queue.get, None))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not worth a training
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._given_up.acquire(blocking=False):
            return  # the thread and its owner may come to it at the same time
        log.warning("%s is off from here on (%s); all else goes on", self.name, reason)
        end_service()


def tell_tensorboard(run: Path, start_step: int, rows: Rows) -> None:
    """Writes event files; steps that are taken again are purged from those of earlier starts."""
    tracker = TensorBoardTracker("tensorboard", run, purge_step=start_step + 1)
    tracker.start()
    for step, values in rows:
        tracker.log(values, step=step)
    tracker.finish()


def tell_wandb(config: RunConfig, rows: Rows) -> None:
    """Adds to the run's record at W&B the steps that no earlier start has sent.

    W&B holds rows back, and a kill loses them. So a part counts only once W&B has closed it; the
    lines of a start that was killed are sent again by the next one, from `metrics.jsonl`.
    """
    note, step, name = config.directory / "wandb_sent.json", 0, ""
    if note.exists():
        step, name = itemgetter("step", "part")(json.loads(note.read_bytes()))
    for partial in config.directory.glob(".wandb.training.*"):
        if name and (partial / "wandb" / name).is_dir():  # closed and noted, then killed
            publish(config.directory, partial, name)
        shutil.rmtree(partial, ignore_errors=True)
    part = Part(config, "training")
    last = newest = max(step, part.known)
    for step, values in rows:
        if step > last:
            part.tracker.log(values, step=step)
            newest = step
    part.tracker.finish()
    files.write_json(note, {"step": newest, "part": part.name})
    publish(config.directory, part.partial, part.name)


class Part:
    """A visit to the run's record at W&B, written aside.

    Attributes:
        known: the last step that the service holds already; 0 offline, where nobody can be asked.
        name: of the folder that W&B makes.
    """

    def __init__(self, config: RunConfig, kind: str) -> None:
        aside = tempfile.mkdtemp(prefix=f".wandb.{kind}.", suffix=".partial", dir=config.directory)
        self.partial = Path(aside)
        self.tracker = start_wandb(config, self.partial)
        run = self.tracker.tracker
        self.known = max(0, run.starting_step - 1)
        self.name = Path(run.settings.sync_dir).name


def start_wandb(config: RunConfig, folder: Path) -> WandBTracker:
    """Online where it is asked for, there is a key and the service answers, offline otherwise."""
    import wandb

    def start(mode: str) -> WandBTracker:
        tracker = WandBTracker(
            config.track.project,
            mode=mode,
            id=wandb_id(config.directory),
            resume="allow",
            name=config.name,
            group=config.track.group,
            dir=str(folder),
            # No look at the terminal, the code or the commit: nobody asked for it, and the
            # address of a repository may hold a password.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
                init_timeout=PATIENCE / 4,
                finish_timeout=PATIENCE / 4,
                finish_timeout_raises=True,
            ),
        )
        tracker.start()
        tracker.store_init_configuration(plain(config))
        return tracker

    if config.track.wandb == "online":
        try:
            if wandb.login(prompt=False, verify=False):
                return start("online")
            log.warning("W&B has no key (see `wandb login`), so it is offline; %s", SYNC)
        except wandb.Error as error:
            log.warning("W&B is not reached (%s), so it is offline; %s", error, SYNC)
            wandb.teardown()
    return start("offline")


def publish(run: Path, partial: Path, name: str) -> None:
    """Gives a part that is complete its place and name."""
    place = run / "wandb" / name
    while place.exists():  # two starts within a second
        place = place.with_name(f"{place.name}.1")
    place.parent.mkdir(exist_ok=True)
    (partial / "wandb" / name).rename(place)
    shutil.rmtree(partial, ignore_errors=True)


def end_service() -> None:
    """Ends W&B's process, where there is one; a stuck one would keep this process from ending."""
    children: list[psutil.Process] = []
    with suppress(psutil.Error):  # a system may hide the processes of others, and so refuse a list
        children = psutil.Process().children()
    for child in children:
        # Another one may just have ended. And W&B leaves the program with the exit code of its
        # process, once that was killed.
        with suppress(Exception, SystemExit):
            if child.name() == "wandb-core":
                child.kill()
                sys.modules["wandb"].teardown()


def send_scores(config: RunConfig, metrics: dict[str, Any]) -> None:
    """Adds what a scoring found to the training's record at W&B, if `track.media` asks for it.

    As the run's summary: mean figures, a table of the categories, the examples and their maps.

    Args:
        metrics: the content of `metrics.json`.
    """

    def send(_: Rows) -> None:
        import wandb

        folder, part = scores_folder(config), Part(config, "scores")
        figures = {k: v for k, v in metrics["mean"].items() if isinstance(v, float)}
        table = wandb.Table(
            columns=["category", *figures],
            data=[[name, *map(of.get, figures)] for name, of in metrics["categories"].items()],
        )
        examples = [
            wandb.Image(picture, caption=f"{entry['kind']}: {entry['key']}")
            for entry in json.loads((folder / "examples/examples.json").read_bytes())
            for picture in pictures(folder / "examples", entry)
        ]
        said = {**figures, "categories": table, "examples": examples}
        part.tracker.tracker.summary.update({f"{folder.name}/{k}": v for k, v in said.items()})
        part.tracker.finish()
        publish(config.directory, part.partial, part.name)

    if config.track.media and config.track.wandb != "disabled":
        Aside("Weights & Biases", send).close()


def pictures(folder: Path, entry: dict[str, Any]) -> Iterator[Image.Image]:
    """An example's image, and its map in 8 bits."""
    with Image.open(folder / entry["image"]) as image:
        yield image.copy()
    with Image.open(folder / entry["map"]) as image:
        yield Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def check_trackers(track: TrackConfig) -> None:
    """Refuses a run that asks for a tracker whose package is not installed."""
    asked = {"wandb": track.wandb != "disabled", "tensorboard": track.tensorboard}
    for package, wanted in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"track.{package} is {getattr(track, package)}, but the package {package} is not "
                "installed",
                f"pip install 'kdad_dist[{package}]', or leave track.{package} out",
            )


def wandb_id(run: Path) -> str:
    """The one identity that a run keeps over all its resumes; made at the first start."""
    path = run / "wandb_id"
    if not path.exists():
        files.write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step` (they will be written again) and a line cut off by a kill."""
    if not path.exists():
        return
    kept = "".join(json.dumps(record) + "\n" for record in records(path) if record["step"] <= step)
    if kept != path.read_text(encoding="utf-8", errors="replace"):
        files.write_text(path, kept)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, but for one that a kill or a power cut spoilt."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            yield json.loads(line)
