"""Flags on which all processes agree without a step ever waiting.

Every `check_every` steps the flags of all processes are reduced in the background, and read when
the next such step comes: all processes read the same answer at the same step, and none waited.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What all processes agreed on."""

    first_bad: int | None = None
    """The first step whose update was not finite (and was not applied)."""
    stop: bool = False
    save: bool = False

    def also(self, later: "Verdict") -> "Verdict":
        """Both together."""
        first_bad = later.first_bad if self.first_bad is None else self.first_bad
        return Verdict(first_bad, self.stop or later.stop, self.save or later.save)


class Agreement:
    """Flags that any process may raise and that all of them read at the same step."""

    def __init__(self, device: torch.device, every: int) -> None:
        self.every = every
        self._first_bad = torch.full((), -1.0, device=device, dtype=torch.float64)
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def note(self, step: int, finite: Tensor) -> None:
        """Remembers on the device whether the update of `step` was finite."""
        first = ~finite & (self._first_bad < 0)
        self._first_bad = torch.where(first, float(step), self._first_bad)

    def check(self, step: int, stop: bool, save: bool) -> Verdict:
        """At every `every`-th step, what was agreed at the one before; at others nothing."""
        if step % self.every:
            return Verdict()
        verdict = self._read()
        self._post(stop, save)
        return verdict

    def settle(self) -> Verdict:
        """Waits until everything up to now is agreed: before a checkpoint, and at the end."""
        earlier = self._read()
        self._post(stop=False, save=False)
        return earlier.also(self._read())

    def _post(self, stop: bool, save: bool) -> None:
        wishes = torch.tensor([stop, save], dtype=torch.float64)
        flags = torch.cat([self._first_bad[None], wishes.to(self._first_bad.device)])
        work = None
        if dist.is_initialized():
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = flags, work

    def _read(self) -> Verdict:
        if self._pending is None:
            return Verdict()
        flags, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        first_bad, stop, save = flags.tolist()
        return Verdict(None if first_bad < 0 else int(first_bad), bool(stop), bool(save))
