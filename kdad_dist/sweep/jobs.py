"""One configuration over many classes, or in many variants: the runs of a sweep, and what is left
to do of each.

`runs/NAME/` holds, for each run, `CLASS/` (the run itself), `CLASS.yaml` (what it is started with)
and `CLASS.log` (what it said); further seeds stand beside it as `CLASS-seed1` and so on. What is
left to do follows from the runs themselves.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdad_dist import files
from kdad_dist.config.changes import changed_keys
from kdad_dist.config.load import CONFIG_FILE, SWEEP_FILE, dump, load_run
from kdad_dist.config.run import RunConfig
from kdad_dist.runtime.rundir import ENDS, STATUS_FILE, last_words
from kdad_dist.sweep.published import Figures

SCORED, NOT_SCORED, NOT_STARTED = "scored", "not scored", "not started"
KINDS = {"selected": f"metrics{ENDS['best']}.json", "final": f"metrics{ENDS['last']}.json"}
"""Whose figures stand in the table, and the files of a run that hold them."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep: one class or variant, one seed."""

    name: str
    config: RunConfig
    needs: tuple["Job", ...] = ()
    """The runs that this one starts from, of the same seed."""

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
        state = files.read_json(self.run / STATUS_FILE).get("state", NOT_STARTED)
        if state != "finished":
            return state
        return SCORED if self.figures().keys() == KINDS.keys() else NOT_SCORED

    def reason(self) -> str | None:
        """Why the run is not scored, as far as is known."""
        state = self.state()
        if state in (SCORED, "running", "preempted"):
            return None
        waits = self.waits_for() if state == NOT_STARTED else []
        return (
            " and ".join(f"{need.name} {need.fate()}" for need in waits)
            or self.last_words()
            or files.read_json(self.run / STATUS_FILE).get("reason")
            or "".join(f"only its {kind} checkpoint is" for kind in self.figures())
            or None
        )

    def waits_for(self) -> list["Job"]:
        """The needed runs that are not trained."""
        return [need for need in self.needs if need.state() not in (SCORED, NOT_SCORED)]

    def fate(self) -> str:
        """What became of a run that others wait for."""
        state = self.state()
        if state == NOT_STARTED:  # unless it said why it could not
            return "failed" if self.reason() else state
        return state if state == "failed" else f"is {state}"

    def last_words(self) -> str | None:
        """Why the last command failed, in its own words; None where it has not said so."""
        return last_words(self.log)

    def figures(self) -> dict[str, dict[str, Any]]:
        """By kind, what was measured of the run as it is, for its configuration as it is now."""
        try:
            started = (self.run / CONFIG_FILE).stat().st_mtime_ns
            # A start of the training notes its configuration anew.
            if any((need.run / CONFIG_FILE).stat().st_mtime_ns > started for need in self.needs):
                return {}
            there = {kind: self.run / name for kind, name in KINDS.items()}
            new = {k: f for k, f in there.items() if f.is_file() and f.stat().st_mtime_ns > started}
            found = {kind: json.loads(file.read_bytes()) for kind, file in new.items()}
            noted = load_run(self.run) if found else self.config
        except (OSError, ValueError):  # also of a file that is no longer sound
            return {}
        same = (noted.score, noted.method) == (self.config.score, self.config.method)
        return found if same and not changed_keys(noted, self.config) else {}


@dataclass(frozen=True)
class Sweep:
    base: RunConfig
    names: tuple[str, ...]
    """Of the classes or variants, in the order of the table."""
    seeds: int
    jobs: tuple[Job, ...]
    """The first seed of every class, then the second of every class, and so on."""
    rows: Literal["class", "variant"] = "class"
    published: Figures = field(default_factory=dict)
    """What others publish."""
    typed: tuple[str, ...] = ()
    """The overrides of the configuration, of which published figures know nothing."""

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


def stages(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in the order in which they can be started: what needs none of the others first."""
    runs = {job.run for job in jobs}

    def depth(job: Job) -> int:
        return max((1 + depth(need) for need in job.needs if need.run in runs), default=0)

    depths = [depth(job) for job in jobs]
    return [
        [job for job, at in zip(jobs, depths, strict=True) if at == stage]
        for stage in range(max(depths, default=-1) + 1)
    ]
