"""The runs of a sweep on this machine, one after the other or several at once.

Each run is the commands that a person would type, in processes of their own: a crash of one run
does not touch the others, and each sees its own GPUs.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from signal import SIGABRT, SIGINT, Signals
from threading import Event
from typing import TextIO

import torch

from kdad_dist import files
from kdad_dist.errors import Interrupted, KdadError, Preempted
from kdad_dist.runtime.progress import Progress, progress
from kdad_dist.runtime.rundir import COMMAND
from kdad_dist.runtime.stopping import PREEMPT_FILE, StopRequest, forget_requests
from kdad_dist.sweep.jobs import NOT_STARTED, Job, Sweep, stages
from kdad_dist.sweep.table import write_table

log = logging.getLogger(__name__)
LAUNCHED = ("KDAD_MODE", "KDAD_PROCESSES")
"""With one of these in the environment, the runs are started by the launch scripts."""
STOPPED = (Preempted.exit_code, Interrupted.exit_code, -SIGINT)
"""What a command leaves with that is to be started again: Ctrl-C reaches it as it reaches us,
perhaps before it is ready for it."""
POLL = 0.3  # seconds


@dataclass(frozen=True)
class Outcome:
    """How the commands of a run ended."""

    job: Job
    code: int = 0
    reason: str = ""


class Runner:
    """Carries out runs; its methods may be called from several threads."""

    def __init__(self, environments: Sequence[dict[str, str]], stop: StopRequest) -> None:
        """Args:
        environments: one for each of the runs that may be under way at once.
        stop: of the sweep.
        """
        self.stop, self.ending = stop, Event()
        self.free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in environments:
            self.free.put(environment)

    def __call__(self, job: Job) -> Outcome:
        if waits := job.waits_for():
            stopped = ("preempted", NOT_STARTED)
            go_on = all(need.state() in stopped and not need.reason() for need in waits)
            return Outcome(job, Preempted.exit_code if go_on else 1, job.reason() or "")
        environment = self.free.get()
        try:
            with (
                files.writing(job.log),
                job.log.open("a", encoding="utf-8", errors="backslashreplace") as messages,
            ):
                for verb, command in commands(job).items():
                    # A report takes a moment; a run that is scored counts as done.
                    if self.stopping() and verb != "report":
                        return Outcome(job, Preempted.exit_code)
                    messages.write(f"{COMMAND}{shlex.join(command)}\n")
                    messages.flush()
                    log.info("%s: %s", job.run.name, verb)
                    code = self.follow(command, job, environment, messages)
                    if code in STOPPED or self.left_unsaid(job, code):
                        return Outcome(job, 0 if verb == "report" else Preempted.exit_code)
                    if code:
                        return Outcome(job, code, reason(job, code))
        except KdadError as error:
            return Outcome(job, error.exit_code, str(error))
        finally:
            self.free.put(environment)
        return Outcome(job)

    def stopping(self) -> bool:
        return self.stop.reason is not None or self.ending.is_set()

    def left_unsaid(self, job: Job, code: int) -> bool:
        """Whether a command ended without a word of its own amid the end of the sweep: the same
        Ctrl-C reaches it, and Python that has hardly begun, or C++ below it, leaves with any code.
        """
        by_itself = code > 0 or code == -SIGABRT
        return by_itself and self.stopping() and job.last_words() is None

    def follow(
        self, command: list[str], job: Job, environment: dict[str, str], messages: TextIO
    ) -> int:
        """The exit code of a command, which is asked to stop when the sweep is."""
        process = subprocess.Popen(  # noqa: S603 (our own program, its words one by one)
            command, env=os.environ | environment, stdout=messages, stderr=messages
        )
        while True:
            try:
                return process.wait(POLL)
            except subprocess.TimeoutExpired:
                if self.ending.is_set():
                    process.terminate()
                if self.stopping() and job.run.is_dir():
                    # Again and again: a command that is just starting takes it for an old one.
                    (job.run / PREEMPT_FILE).touch()


def run_all(sweep: Sweep, at_once: int) -> list[Outcome]:
    """Trains, scores and reports every run that is not done; writes the table after each.

    One that fails does not stop the others. Asked to stop, it asks the runs that are under way,
    and begins no other.

    Raises:
        Preempted: it was asked to stop.
        UsageError: another sweep is at work in the directory.
    """
    left, outcomes = sweep.left(), []
    done = len(sweep.jobs) - len(left)
    log.info("%d of %d runs are done", done, len(sweep.jobs))
    with files.writing(sweep.directory):
        sweep.directory.mkdir(parents=True, exist_ok=True)
    with files.exclusive(sweep.directory):
        sweep.write(left)
        write_table(sweep)
        forget_requests(sweep.directory)
        stop = StopRequest(sweep.directory)
        runner = Runner(environments(at_once, gpus()), stop)
        with (
            progress(sweep.directory.name, len(sweep.jobs), "runs", done) as bar,
            ThreadPoolExecutor(at_once) as pool,
            stop.heeded(),
            stop.heeding_interrupts(),
        ):
            try:
                for stage in stages(left):
                    for ended in rounds([pool.submit(runner, job) for job in stage]):
                        stop.poll()
                        outcomes += ended
                        for outcome in ended:
                            tell(outcome)
                            write_table(sweep)
                        count(bar, done, outcomes)
            except BaseException:
                runner.ending.set()
                raise
    if runner.stopping() and (left := sweep.left()):
        raise Preempted(
            f"the sweep was stopped with {len(left)} of {len(sweep.jobs)} runs to go",
            "start the same command again to go on",
        )
    return outcomes


def rounds(pending: Sequence[Future[Outcome]]) -> Iterator[list[Outcome]]:
    """The outcomes as they come; every now and then none, to look around meanwhile."""
    waiting = set(pending)
    while waiting:
        ended, waiting = wait(waiting, POLL, FIRST_COMPLETED)
        yield [future.result() for future in ended]


def count(bar: Progress, before: int, outcomes: Sequence[Outcome]) -> None:
    """Shows how many runs have ended, those that were done before this start among them."""
    ended = [outcome for outcome in outcomes if outcome.code != Preempted.exit_code]
    failed = sum(outcome.code != 0 for outcome in ended)
    bar.advance(before + len(ended) - bar.done, f"{failed} failed" if failed else "")


def commands(job: Job) -> dict[str, list[str]]:
    """What is run for a job, by the verbs."""
    python = [sys.executable, "-m", "kdad_dist"]
    train, score = [*python, "train"], [*python, "score"]
    if any(name in os.environ for name in LAUNCHED):
        launch = files.shipped("launch")
        train, score = [str(launch / "train.sh")], [str(launch / "score.sh")]
    return {
        "train": [*train, str(job.file)],
        "score": [*score, str(job.run), "--both"],
        "report": [*python, "report", str(job.run)],
    }


def told(sweep: Sweep) -> str:
    """What would be started, for a person: the commands of each run that is not done."""
    done = len(sweep.jobs) - len(sweep.left())
    lines = [f"{done} of {len(sweep.jobs)} runs are done"]
    for job in (job for stage in stages(sweep.left()) for job in stage):
        after = ", ".join(need.run.name for need in job.needs)
        lines.append(f"\n{job.run.name} ({job.state()}){f', after {after}' if after else ''}:")
        lines += [f"  {shlex.join(command)}" for command in commands(job).values()]
    return "\n".join(lines)


def tell(outcome: Outcome) -> None:
    job = outcome.job
    match outcome.code:
        case 0:
            log.info("%s: done", job.run.name)
        case Preempted.exit_code:
            log.info("%s: stopped, to go on later", job.run.name)
        case _:
            where = f"\n  {job.log}" if job.log.is_file() else ""  # none: it was never started
            log.error("%s: failed: %s%s", job.run.name, outcome.reason, where)


def reason(job: Job, code: int) -> str:
    """Why a command failed."""
    if code < 0:
        return f"killed by {Signals(-code).name}"
    return job.last_words() or f"exit code {code}; the end of {job.log} may say why"


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


def environments(at_once: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """For each run that is under way at once, its share of the GPUs, or of the cores.

    Where there are fewer GPUs than runs, several runs share one.
    """
    found: list[dict[str, str]] = [{"KDAD_PYTHON": sys.executable} for _ in range(at_once)]
    for i, environment in enumerate(found):
        if gpus:
            first, end = (k * len(gpus) // at_once for k in (i, i + 1))
            mine = gpus[first:end] if len(gpus) >= at_once else [gpus[i % len(gpus)]]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            if os.environ.get("KDAD_MODE", "cpu") != "cpu" and "KDAD_PROCESSES" not in os.environ:
                environment["KDAD_PROCESSES"] = str(len(mine))
        if at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    return found


def refuse_failures(outcomes: Sequence[Outcome]) -> None:
    """Raises:
    KdadError: runs failed; it names them, and why.
    Preempted: none failed, but some stopped before their end, by their own time limit say.
    """
    failed = [o for o in outcomes if o.code not in (0, Preempted.exit_code)]
    if failed:
        raise KdadError(
            f"{len(failed)} of {len(outcomes)} runs failed:\n"
            + "\n".join(f"{o.job.run.name}: {o.reason}" for o in failed),
            "mend it and start the same command again: what is done is kept",
        )
    stopped = [o for o in outcomes if o.code == Preempted.exit_code]
    if stopped:
        raise Preempted(
            f"{len(stopped)} of {len(outcomes)} runs stopped before their end",
            "start the same command again to go on",
        )
