"""The directory of a run: who may use it, and for which configuration."""

import json
import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from kdad_dist import files
from kdad_dist.config.changes import changed_keys
from kdad_dist.config.errors import NOT_YAML
from kdad_dist.config.load import CONFIG_FILE, SWEEP_FILE, dump, elsewhere, load_run
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index
from kdad_dist.data.records import DECODED
from kdad_dist.errors import ConfigError, DataError, Interrupted
from kdad_dist.runtime import environment
from kdad_dist.runtime.stopping import PREEMPT_FILE, forget_requests

log = logging.getLogger(__name__)
DATA_FILE = "data.json"
STATUS_FILE = "status.json"
LOG_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
OURS = {PREEMPT_FILE, CHECKPOINTS, "wandb", "wandb_id", "tensorboard"}
"""Besides text, what a start that was broken off may have left."""
FOREIGN = DECODED | {".tar", ".zip"}
"""Of data, which nobody keeps where a run is to begin, as they do logs, notes or weights."""
COMMAND = "== "
"""Begins the line of a log of several commands after which the next one speaks."""
ENDS = {"best": "", "last": "-last"}
"""What the names of results end in, by the checkpoint that they are of."""
MAY_MOVE = ("method.weights:", "method.network.weights:", "method.teacher.weights:")


def refuse_changes(config: RunConfig) -> None:
    """Refuses a directory that holds the run of another configuration, unless told to accept it;
    that of a sweep, one of data, and a file.

    Raises:
        ConfigError: naming the keys that differ, or what is there instead of a run.
        DataError: the directory cannot be read.
    """
    run = config.directory
    another = f"give this run another directory: {shlex.quote(elsewhere(config, 'one'))}"
    if not (run / CONFIG_FILE).is_file():
        if (run / SWEEP_FILE).is_file():
            raise ConfigError(
                f"{run} is the directory of a sweep, whose runs have their own in it", another
            )
        try:
            nearest = next(path for path in (run, *run.parents) if path.exists())
            found = stranger(run) if nearest == run and run.is_dir() else None
        except OSError as error:
            raise DataError(f"{run} cannot be read: {error}", another) from None
        if not nearest.is_dir():
            raise ConfigError(f"{nearest} is a file, not the directory of a run", another)
        if found:
            raise ConfigError(f"{run} holds no run, but other files, such as {found}", another)
        return
    changes = changed_keys(load_run(run), config)
    if not changes:
        return
    text = "\n  ".join(changes)
    if config.train.changed_config == "refuse":
        raise ConfigError(
            f"{run} holds a run of another configuration:\n  {text}",
            "give this run another `output` (or `name`), or set train.changed_config=accept",
        )
    log.warning("going on in %s with a changed configuration:\n  %s", run, text)


def stranger(run: Path) -> Path | None:
    """A file of data in a directory without `config.yaml` that no start of ours left;
    None where there is none.
    """
    return next(
        (
            path
            for entry in run.iterdir()
            if not entry.name.startswith(".") and entry.name not in OURS
            for path in (entry.rglob("*") if entry.is_dir() else [entry])
            if path.is_file() and path.suffix.lower() in FOREIGN
        ),
        None,
    )


def refuse_another_reading(config: RunConfig) -> None:
    """Refuses to read a trained student as another one, or to hold out what it was trained on.

    A file of weights may have moved: its content is known by hash.

    Raises:
        ConfigError: naming the keys that differ from those of the run.
    """
    bound = ["method.", "data.classes:"]
    bound += [] if other_shards(config) else ["data.val_fraction:"]
    changes = [
        change
        for change in changed_keys(load_run(config.directory), config)
        if change.startswith(tuple(bound)) and not change.startswith(MAY_MOVE)
    ]
    if changes:
        text = "\n  ".join(changes)
        raise ConfigError(
            f"{config.directory} was trained otherwise:\n  {text}",
            "leave these out: they say what was trained, not how it is read",
        )


class Results(NamedTuple):
    """Where the results of a checkpoint on the run's own data are, once it is scored."""

    checkpoint: str
    """As `score.checkpoint` names it."""
    metrics: Path
    scores: Path


def results(run: Path) -> tuple[Results, Results]:
    """The results that count, and those that may stand beside them.

    Those of the checkpoint that `score.checkpoint` of the run names count, or where that is not
    scored, those of the other one.
    """
    best, last = (
        Results(name, run / f"metrics{end}.json", run / f"scores{end}")
        for name, end in ENDS.items()
    )
    if not last.metrics.is_file():
        return best, last
    if not best.metrics.is_file() or wanted_checkpoint(run) == "last":
        return last, best
    return best, last


def wanted_checkpoint(run: Path) -> str:
    """`score.checkpoint` of a run, of whose configuration nothing else need be sound."""
    try:
        return yaml.safe_load((run / CONFIG_FILE).read_bytes())["score"]["checkpoint"]
    except (OSError, LookupError, TypeError, *NOT_YAML):
        return "best"  # where nothing is said


@contextmanager
def claimed(config: RunConfig) -> Iterator[None]:
    """Makes the directory and keeps other processes out of it; a new one that nothing came of goes.

    Raises:
        DataError: the directory cannot be written, now or later.
        UsageError: another process is using it.
    """
    run = config.directory
    with files.writing(run):
        is_new = not run.exists()
        run.mkdir(parents=True, exist_ok=True)
        with files.exclusive(run):
            try:
                forget_requests(run)
                yield
            finally:
                if is_new and not any((run / name).exists() for name in (CONFIG_FILE, STATUS_FILE)):
                    shutil.rmtree(run)


def note(config: RunConfig, index: Index) -> None:
    """Writes down what runs here, once it is known that it can: a mistake must not bind the next
    attempt to itself.
    """
    facts = ("fingerprint", "layout", "resize", "image_size", "categories")
    files.write_json(config.directory / DATA_FILE, {name: getattr(index, name) for name in facts})
    files.write_text(config.directory / CONFIG_FILE, dump(config))
    files.write_json(config.directory / "environment.json", environment.describe())


def data_fact(config: RunConfig, name: str) -> str:
    """A fact about the data that a run was trained on, from the run itself: its shards may be gone.

    Raises:
        DataError: the file with these facts is missing or damaged.
    """
    path = config.directory / DATA_FILE
    try:
        return str(json.loads(path.read_bytes())[name])
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else f"is damaged: {error!r}"
        raise DataError(
            f"{path} {what}, so it is not known what data the run was trained on",
            "copy it from the original run, or start the training again where its shards are, "
            "which writes it",
        ) from None


def metrics_file(config: RunConfig) -> Path:
    """Where scoring writes what it measures."""
    return config.directory / f"metrics{suffix(config)}.json"


def scores_folder(config: RunConfig) -> Path:
    """Where scoring writes scores, curves, maps and examples."""
    return config.directory / f"scores{suffix(config)}"


def suffix(config: RunConfig) -> str:
    """What the names of results end in: nothing for the run's own data and its best checkpoint."""
    return other_data(config) + ENDS[config.score.checkpoint]


def other_data(config: RunConfig) -> str:
    """A name for the data that is scored, "" where it is what the run was trained on.

    That may lie in another place by now: it is known by its content. Another choice of categories
    is other data too.

    Raises:
        DataError: the shards have no sound index, or the run does not say what it was trained on.
    """
    name, category = "", config.data.category
    if other_shards(config):
        found = Index.read(config.data.shards).fingerprint
        if found != data_fact(config, "fingerprint"):
            name = f"-{Path(config.data.shards).resolve().name[:40]}-{found[:8]}"
    if not name and category != load_run(config.directory).data.category:
        name = f"-{category if isinstance(category, str) else '+'.join(category)}"[:60]
    return name


def other_shards(config: RunConfig) -> bool:
    """Whether another place is named than the run's configuration does."""
    return config.data.shards != load_run(config.directory).data.shards


def unfinished(run: Path, step: int) -> str | None:
    """That a checkpoint is of a training which has not come to its end, where the run says so."""
    status = files.read_json(run / STATUS_FILE)
    steps = status.get("steps")
    if status.get("state", "finished") != "finished" and isinstance(steps, int) and step < steps:
        return f"step {step} of {steps}: not trained to its end"
    return None


def warn_if_unfinished(run: Path, step: int) -> None:
    """Says in the log what `unfinished` finds."""
    if told := unfinished(run, step):
        log.warning("%s: %s", run, told)


def last_words(log: Path) -> str | None:
    """Why the last command in the log of a sweep's run failed; None where it has not said so,
    or was left by a person.
    """
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(COMMAND)]
    lines = lines[starts[-1] if starts else 0 :]
    ours = [i for i, line in enumerate(lines) if line.startswith("kdad: ")]
    if not ours:
        return None
    # A message goes on in lines that are indented.
    end = next((i for i in range(ours[-1] + 1, len(lines)) if lines[i][:2] != "  "), len(lines))
    words = "\n".join(lines[ours[-1] : end]).removeprefix("kdad: ")
    return None if words == str(Interrupted()) else words
