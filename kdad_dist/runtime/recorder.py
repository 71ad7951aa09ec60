"""What a training says of itself while it runs: metric lines, the status file, the bar."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from kdad_dist.config.run import RunConfig
from kdad_dist.runtime import flops
from kdad_dist.runtime.account import peak_memory
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.status import Status
from kdad_dist.runtime.tracker import Tracker
from kdad_dist.wording import duration, readable

log = logging.getLogger(__name__)
COLD, WARM = 4, 20
"""Steps of a start between which the pace is taken that tells how long the rest will take."""
STATUS_EVERY = 5.0
"""Seconds between two notes of the step in the status file; each waits for the disk."""


class Epochs(Protocol):
    """The arithmetic of a loader."""

    @property
    def steps_per_epoch(self) -> int: ...

    def samples_seen(self, step: int) -> int: ...


class Recorder:
    """Turns steps into lines of `metrics.jsonl`, the status file and the progress bar."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        loader: Epochs,
        state: TrainState,
        steps: int,
        operations: float,
    ) -> None:
        """Args:
        state: from which this start goes on.
        steps: of the whole training.
        operations: that an image costs, forward and backward.
        """
        run = config.directory
        self.name, self.every = config.name, config.train.log_every
        self.session, self.loader, self.steps = session, loader, steps
        self.operations, self.peak = operations, peak_of(session, config.train.precision)
        self.tracker = Tracker(run, session, config, state.step)
        self.status = Status(run, steps, session.is_main)
        self.status.step = state.step
        self._status_at = -math.inf
        self._first = state.step
        self._cold: tuple[int, float] | None = None
        self._note = ""
        self.restart_clock(state.step)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Shows the bar, and notes how the training ends."""
        title, done = self.name, self.status.step
        visible = self.session.is_main
        try:
            with (
                self.status.outcome(),
                progress(title, self.steps, "steps", done, visible) as self._bar,
                ExitStack() as self._before,
            ):
                self._before.enter_context(self._bar.beside("the first step"))
                yield
        finally:
            self.tracker.close()

    def step(self, done: int, losses: dict[str, Tensor], norm: Tensor, lr: float) -> None:
        """Notes a step; every `log_every`-th becomes a line, the same on any number of processes.

        Args:
            done: steps taken so far.
            losses: this process's part of the mean losses of the step.
            norm: of the gradient before clipping.
            lr: the learning rate of the step.
        """
        self._before.close()
        self.status.step = done
        if done % self.every == 0 or done == self.steps:
            # The one place where the host waits for the device.
            values = self.session.sum(torch.stack(list(losses.values()))).tolist()
            self._write(done, dict(zip(losses, values, strict=True)), norm.item(), lr)
        if done - self._first in (COLD, WARM):
            self._tell(done, norm)
        self._bar.advance(note=self._note)

    def held_out(self, batch: int, batches: int) -> None:
        """Shows how far a validation is, beside the bar that stands still meanwhile."""
        self._bar.advance(0, note=f"held-out batch {batch} of {batches}")

    def _write(self, done: int, losses: dict[str, float], norm: float, lr: float) -> None:
        now, seen = time.monotonic(), self.loader.samples_seen(done)
        pace = (seen - self._clock_seen) / (now - self._clock)
        self.restart_clock(done)
        self._note = f"loss {losses['loss']:.4g}  {pace:.1f} images/s"
        self.tracker.write(
            {
                "step": done,
                "samples_seen": seen,
                "epoch": self._epoch(done),
                **losses,
                "lr": lr,
                "grad_norm": norm,
                "images_per_second": round(pace, 2),
                **self._arithmetic(pace),
            }
        )
        if now - self._status_at >= STATUS_EVERY:
            self._status_at = now
            self.status.progress()

    def _arithmetic(self, pace: float) -> dict[str, float]:
        """What the launch achieves: 1e12 operations per second, and as a share of its peak."""
        rate = pace * self.operations
        figures = {"tflops": rate / 1e12}
        if self.peak is not None:
            figures["mfu"] = rate / self.peak
        return {name: float(f"{value:.4g}") for name, value in figures.items()}

    def _tell(self, done: int, norm: Tensor) -> None:
        """Once per start, as soon as it is warm: how long the rest takes, and the memory."""
        norm.item()  # waits for the device, which may be steps behind
        now = time.monotonic()
        if self._cold is None:
            self._cold = done, now
            return
        step, then = self._cold
        each = (now - then) / (done - step)
        log.info(
            "%.3g s per step, %s to go for the remaining %d; peak memory so far %s",
            each,
            duration(each * (self.steps - done)),
            self.steps - done,
            readable(peak_memory(self.session.device)),
        )

    def validation(self, done: int, loss: float) -> None:
        self._bar.advance(0, note=self._note)
        self.tracker.write({"step": done, "epoch": self._epoch(done), "val_loss": loss})

    @contextmanager
    def saving(self, done: int) -> Iterator[None]:
        """Writes how long the training stood still for a checkpoint."""
        start = time.monotonic()
        self.tracker.flush()
        with self._bar.beside(f"saving step {done}"):
            yield
        self._bar.advance(0, note=self._note)
        seconds = round(time.monotonic() - start, 4)
        self.tracker.write({"step": done, "epoch": self._epoch(done), "save_seconds": seconds})

    def _epoch(self, done: int) -> float:
        return round(done / self.loader.steps_per_epoch, 4)

    def restart_clock(self, done: int) -> None:
        """Measures the pace afresh, so that validation and saving are left out of it."""
        self._clock, self._clock_seen = time.monotonic(), self.loader.samples_seen(done)


def peak_of(session: Session, precision: str) -> float | None:
    """Operations per second that all devices of the launch can do; None where it is not known."""
    if session.device.type != "cuda":
        return None
    one = flops.peak(torch.cuda.get_device_name(session.device), precision)
    return None if one is None else one * session.world


class SaveTimer:
    """When a checkpoint is due, by the clock of this process or by the step."""

    def __init__(self, config: RunConfig) -> None:
        self.every_steps = config.checkpoint.every_steps
        minutes = config.checkpoint.every_minutes
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self.saved = time.monotonic()

    def due(self) -> bool:
        """By the clock; the processes must agree on it, for their clocks differ."""
        return time.monotonic() - self.saved > self.seconds

    def at(self, done: int) -> bool:
        """By the step, which is the same on every process."""
        return self.every_steps is not None and done % self.every_steps == 0
