"""What a training says of itself while it runs: metric lines, the status file, the bar."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from kdad_dist.config import RunConfig
from kdad_dist.runtime.checkpoint import TrainState
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.status import Status
from kdad_dist.runtime.tracker import Tracker


class Epochs(Protocol):
    """The arithmetic of a loader."""

    @property
    def steps_per_epoch(self) -> int: ...

    def samples_seen(self, step: int) -> int: ...


class Recorder:
    """Turns steps into lines of `metrics.jsonl`, the status file and the progress bar."""

    def __init__(
        self, config: RunConfig, session: Session, loader: Epochs, state: TrainState, steps: int
    ) -> None:
        run = config.directory
        self.name, self.every = config.name, config.train.log_every
        self.session, self.loader, self.steps = session, loader, steps
        self.tracker = Tracker(run, session, config, state.step)
        self.status = Status(run, steps, session.is_main)
        self.status.step = state.step
        self._note = ""
        self.restart_clock(state.step)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Shows the bar, and notes how the training ends."""
        title, done = self.name, self.status.step
        visible = self.session.is_main
        try:
            with self.status.outcome(), progress(title, self.steps, "steps", done, visible) as bar:
                self._bar = bar
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
        self.status.step = done
        if done % self.every == 0 or done == self.steps:
            # The one place where the host waits for the device.
            values = self.session.sum(torch.stack(list(losses.values()))).tolist()
            self._write(done, dict(zip(losses, values, strict=True)), norm.item(), lr)
        self._bar.advance(note=self._note)

    def _write(self, done: int, losses: dict[str, float], norm: float, lr: float) -> None:
        seen = self.loader.samples_seen(done)
        pace = (seen - self._clock_seen) / (time.monotonic() - self._clock)
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
            }
        )
        self.status.progress()

    def validation(self, done: int, loss: float) -> None:
        self.tracker.write({"step": done, "epoch": self._epoch(done), "val_loss": loss})

    def _epoch(self, done: int) -> float:
        return round(done / self.loader.steps_per_epoch, 4)

    def restart_clock(self, done: int) -> None:
        """Measures the pace afresh, so that validation and saving are left out of it."""
        self._clock, self._clock_seen = time.monotonic(), self.loader.samples_seen(done)


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
