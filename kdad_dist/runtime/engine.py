"""Engines: how the processes of a launch train one student together.

The launcher chooses the mode, the configuration does not: the same run may train under another mode
on another machine. Whatever the mode, each process hands over the gradient of its own rows of the
global batch, weighted so that the mean over processes is the gradient of the whole batch.
"""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdad_dist.config.run import RunConfig
from kdad_dist.methods.base import Method
from kdad_dist.runtime.optimizer import build_optimizer
from kdad_dist.runtime.saved import Contents
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.tensors import Tensors, bare

SCALER = ("scale", "_growth_tracker")
"""The part of fp16's loss scaler that changes; it stands among the metrics of a checkpoint."""


class Engine(ABC):
    """Trains a student whose gradients come from all processes."""

    mode: str
    """ddp, fsdp2, zero1, zero2 or zero3."""
    student: nn.Module
    """As the mode wraps it."""
    contents: Contents
    """Student and optimizers, as a checkpoint holds them."""

    @abstractmethod
    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Stands around forward and backward of a micro-batch; after the last of a step the
        gradients travel between the processes.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's part, which will be averaged over processes."""

    @abstractmethod
    def step(self, lr: float, part: str = "") -> Tensor:
        """Clips the gradient, updates a part of the student, clears the gradient.

        Args:
            part: one of the method's; of the others, neither weights nor moments change.

        Returns:
            The norm of the part's whole gradient before clipping, on the device.
        """

    @abstractmethod
    def facts(self) -> dict[str, float]:
        """What a checkpoint must remember beside its tensors."""

    @abstractmethod
    def restore(self, facts: dict[str, float]) -> None:
        """Takes back what `facts` said, among other things; nothing, after another precision."""


class Native(Engine):
    """DDP or FSDP2 around the student, in the hands of accelerate, and an optimizer of torch's for
    each of its parts.
    """

    def __init__(self, config: RunConfig, method: Method, here: Session) -> None:
        student = method.student
        if config.train.compile:
            student.compile()
        # By this attribute accelerate learns which modules FSDP2 gathers and frees as one.
        present = {type(module).__name__ for module in student.modules()}
        student._no_split_modules = sorted(method.blocks & present)  # pyright: ignore
        self.mode, self.accelerator = here.mode, here.accelerator
        # torch has no fused SGD for sharded parameters.
        self.fused = not (here.mode == "fsdp2" and config.optim.name == "sgd")
        parts = [student.get_submodule(part) for part in method.parts]
        optimizers = [build_optimizer(config, part, self.fused) for part in parts]
        self.student, *prepared = here.accelerator.prepare(student, *optimizers)
        own: list[torch.optim.Optimizer] = [wrapped.optimizer for wrapped in prepared]
        self.optimizers = dict(zip(method.parts, own, strict=True))
        self.limit = config.optim.clip or math.inf
        self.contents = Tensors(self.student, *own)

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.student)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, lr: float, part: str = "") -> Tensor:
        """As the base says. A non-finite update is skipped: by a fused optimizer itself, on the
        device (`found_inf`); for any other the host waits.
        """
        optimizer = self.optimizers[part]
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = bare(self.student).get_submodule(part).parameters()
        norm = nn.utils.clip_grad_norm_(parameters, self.limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif self.fused:
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # pyright: ignore
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        for each in self.optimizers.values():
            each.zero_grad(set_to_none=True)
        return norm

    def facts(self) -> dict[str, float]:
        scaler = self.accelerator.scaler
        return {name: scaler.state_dict()[name] for name in SCALER} if scaler is not None else {}

    def restore(self, facts: dict[str, float]) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:
            said = {name: facts[name] for name in SCALER if name in facts}
            scaler.load_state_dict(scaler.state_dict() | said)
