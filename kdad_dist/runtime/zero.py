"""DeepSpeed's ZeRO: each process keeps and updates a part of the optimizer's state (stage 1), of
the gradients too (2), of the parameters too (3).

Weights, gradients and sums are float32, as in every other mode; bf16 means autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdad_dist.config.run import RunConfig
from kdad_dist.methods.base import Method
from kdad_dist.runtime.engine import Engine
from kdad_dist.runtime.optimizer import build_optimizer
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.zero_config import settle
from kdad_dist.runtime.zero_shards import Shards


class Zero(Engine):
    """DeepSpeed's engine around the student, and torch's own optimizer inside of it."""

    def __init__(self, config: RunConfig, method: Method, here: Session) -> None:
        if config.train.compile:
            method.student.compile()
        plugin = here.accelerator.state.deepspeed_plugin
        assert plugin is not None
        settle(plugin.deepspeed_config, config)
        optimizer = build_optimizer(config, method.student)
        self.mode, self.device = here.mode, here.device
        self.engine = here.accelerator.prepare(method.student, optimizer)[0]
        self.student = self.engine
        self.contents = Shards(self.engine)

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float, part: str = "") -> Tensor:
        """As the base says; DeepSpeed itself skips a non-finite update, its norm is infinite."""
        assert not part, "refused by refuse_mode"
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def facts(self) -> dict[str, float]:
        return {}

    def restore(self, facts: dict[str, float]) -> None:
        """Nothing: there were none."""
