"""One configuration over many classes: the runs of a sweep, and what is left to do of each.

`runs/NAME/` holds, for each run, `CLASS/` (the run itself), `CLASS.yaml` (what it is started with)
and `CLASS.log` (what it said); further seeds stand beside it as `CLASS-seed1` and so on. Nothing
else is remembered: what is left to do follows from the runs themselves.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdad_dist import files
from kdad_dist.config import RunConfig, changed_keys, dump, load, load_run
from kdad_dist.data.index import Index, Split
from kdad_dist.errors import ConfigError, KdadError, UsageError
from kdad_dist.runtime.rundir import CONFIG_FILE, SWEEP_FILE, last_words, metrics_file

SCORED, NOT_SCORED, NOT_STARTED = "scored", "not scored", "not started"


@dataclass(frozen=True)
class Job:
    """One run of a sweep: one class, one seed."""

    category: str
    config: RunConfig

    @property
    def run(self) -> Path:
        return self.config.directory

    @property
    def file(self) -> Path:
        """The configuration that the run is started with."""
        return self.run.with_name(f"{self.run.name}.yaml")

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    def state(self) -> str:
        """ "scored" is the end; "not scored" that of the training; "not started"; or as in
        `status.json`: "running", "preempted", "failed".
        """
        state = files.read_json(self.run / "status.json").get("state", NOT_STARTED)
        if state != "finished":
            return state
        return SCORED if self.is_scored() else NOT_SCORED

    def last_words(self) -> str | None:
        """Why the last command failed, in its own words; None where it has not said so."""
        return last_words(self.log)

    def is_scored(self) -> bool:
        """Whether the figures of the run are those of its configuration as it is now."""
        try:
            noted = load_run(self.run)
            metrics = metrics_file(self.config)
            # A start of the training notes its configuration anew.
            is_newer = metrics.stat().st_mtime_ns > (self.run / CONFIG_FILE).stat().st_mtime_ns
        except (OSError, KdadError):
            return False
        return (
            is_newer
            and not changed_keys(noted, self.config)
            and (noted.score, noted.method) == (self.config.score, self.config.method)
        )


@dataclass(frozen=True)
class Sweep:
    base: RunConfig
    categories: tuple[str, ...]
    seeds: int
    jobs: tuple[Job, ...]
    """The first seed of every class, then the second of every class, and so on."""

    @property
    def directory(self) -> Path:
        return self.base.directory

    def left(self) -> list[Job]:
        return [job for job in self.jobs if job.state() != SCORED]

    def write(self, jobs: Sequence[Job]) -> None:
        """Writes the configuration of the sweep, and those that these jobs are started with.

        Raises:
            DataError: the directory cannot be written.
        """
        with files.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            files.write_text(self.directory / SWEEP_FILE, dump(self.base))
            for job in jobs:
                files.write_text(job.file, dump(job.config))


def plan(config: str, overrides: Sequence[str], asked: Sequence[str], seeds: int) -> Sweep:
    """The runs of a sweep, every configuration checked.

    Args:
        asked: "all", and names of classes, several in a word with commas between.
        seeds: how many, counted up from the configuration's own.

    Raises:
        ConfigError: the configuration is wrong, or the data hold no such class.
        DataError: the shards have no sound index.
        UsageError: the directory of the sweep is that of a run.
    """
    base = load(config, overrides)
    if (base.directory / CONFIG_FILE).is_file():
        raise UsageError(
            f"{base.directory} is the directory of a run, and a sweep keeps its runs in one of "
            "its own",
            "give the sweep another `name` (or `output`)",
        )
    index = Index.read(base.data.shards)
    is_classes = index.layout == "classes"
    known = (
        {sample.class_name or "" for sample in index.samples if sample.split is Split.TRAIN}
        if is_classes
        else index.categories
    )
    categories = choose(asked, sorted(known), base.data.shards)
    jobs = []
    for number in range(seeds):
        for category in categories:
            stem = folder(category) + (f"-seed{base.seed + number}" if number else "")
            own = {
                "data.normal_class" if is_classes else "data.category": category,
                "name": f"{base.name}-{stem}",
                "output": str(base.directory / stem),
                "seed": base.seed + number,
                "track.group": base.track.group or base.name,
            }
            words = [f"{key}={json.dumps(value)}" for key, value in own.items()]
            jobs.append(Job(category, load(config, [*overrides, *words])))
    refuse_twins(jobs)
    return Sweep(base, categories, seeds, tuple(jobs))


def choose(asked: Sequence[str], known: Sequence[str], shards: str) -> tuple[str, ...]:
    """The classes that the words of `--categories` name, in their order.

    Raises:
        ConfigError: some of them are unknown.
    """
    names: list[str] = []
    for word in asked:
        parts = [word] if word in known else [part.strip() for part in word.split(",")]
        names += known if word == "all" else parts
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(
            f"--categories names {', '.join(map(repr, unknown))}, which {shards} does not hold",
            f"choose from: {', '.join(known)}",
        )
    return tuple(dict.fromkeys(names))


def folder(category: str) -> str:
    """The class as the name of a folder: nearly always itself."""
    name = category.replace("%", "%25").replace("/", "%2F")
    if name.startswith(".") or f"{name}.yaml" == SWEEP_FILE:  # hidden, above, or our own file
        return f"%{ord(name[0]):02X}{name[1:]}"
    return name


def refuse_twins(jobs: Sequence[Job]) -> None:
    """Raises:
    ConfigError: a class is called as another one's further seed.
    """
    runs = [job.run for job in jobs]
    twins = [job for job in jobs if runs.count(job.run) > 1]
    if twins:
        raise ConfigError(
            f"two runs of the sweep would share {twins[0].run}: the class {twins[0].category!r} "
            f"and a further seed of {twins[1].category!r}, or the reverse",
            "sweep over one of them in a sweep of another `name`",
        )
