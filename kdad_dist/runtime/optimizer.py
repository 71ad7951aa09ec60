"""The optimizer that a configuration asks for."""

import torch
from torch import nn

from kdad_dist.config.run import RunConfig
from kdad_dist.schedule import base_lr


def build_optimizer(
    config: RunConfig, student: nn.Module, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters; fused ones can skip an update on the device."""
    optim = config.optim
    lr, groups = base_lr(optim, config.train.batch_size), parameter_groups(config, student)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr, optim.momentum, nesterov=optim.nesterov, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
    return kind(groups, lr, optim.betas, fused=fused)


def parameter_groups(config: RunConfig, student: nn.Module) -> list[dict]:
    """The trainable parameters with weight decay, then those without, each in the student's order.

    Where `optim.decay_vectors` is off, biases and other one-dimensional parameters are not decayed
    (as in MAE: a norm's scale is no weight of a sum).
    """
    optim = config.optim
    decayed, free = [], []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim <= 1 or name.endswith(".bias")
            (free if is_vector and not optim.decay_vectors else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
