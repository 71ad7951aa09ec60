"""The optimizer's groups: what is decayed, in which order, and that checkpoints know by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kdad_dist.config.data import DataConfig
from kdad_dist.config.run import OptimConfig, RunConfig, TrainConfig
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation
from kdad_dist.runtime.optimizer import build_optimizer
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.tensors import Tensors


def config(**optim: object) -> RunConfig:
    return RunConfig(
        name="x",
        data=DataConfig(shards="s"),
        optim=OptimConfig(**{"lr": 0.01, "weight_decay": 0.1} | optim),
        train=TrainConfig(steps=1),
    )


def student() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 2))
    net[3].requires_grad_(False)
    return net


def names(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    known = {parameter: name for name, parameter in net.named_parameters()}
    return [[known[p] for p in group["params"]] for group in optimizer.param_groups]


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_vectors_are_not_decayed_where_that_is_asked_for(name: str) -> None:
    net = student()
    optimizer = build_optimizer(config(name=name, decay_vectors=False), net)
    assert names(net, optimizer) == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]


def test_everything_that_is_trained_is_decayed_by_default_in_the_students_order() -> None:
    net = student()
    optimizer = build_optimizer(config(), net)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert names(net, optimizer) == [trained]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_student_of_matrices_or_of_vectors_alone_has_one_group() -> None:
    asked = config(decay_vectors=False)
    assert len(build_optimizer(asked, nn.Linear(2, 2, bias=False)).param_groups) == 1
    assert len(build_optimizer(asked, nn.LayerNorm(2)).param_groups) == 1


def test_nesterovs_momentum_is_torchs_and_another_than_the_plain_one() -> None:
    nets = [student() for _ in range(3)]
    sgd = {"name": "sgd", "momentum": 0.95, "lr": 0.01}
    trained = [parameter for parameter in nets[1].parameters() if parameter.requires_grad]
    optimizers = [
        build_optimizer(config(**sgd, nesterov=True), nets[0]),
        torch.optim.SGD(trained, 0.01, 0.95, weight_decay=0.1, nesterov=True),
        build_optimizer(config(**sgd), nets[2]),
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        for _ in range(3):
            step(net, optimizer)
    ours, theirs, plain = (net[0].weight for net in nets)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, plain, rtol=1e-2)


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0), ("adam", 0.9)])
def test_nesterov_without_a_momentum_of_sgd_is_refused(name: str, momentum: float) -> None:
    with pytest.raises(ValueError, match="nesterov needs name sgd and a momentum above 0"):
        config(name=name, momentum=momentum, nesterov=True)


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_a_checkpoint_gives_each_parameter_its_own_state_whatever_its_group(
    tmp_path: Path, decay_vectors: bool
) -> None:
    base = config(name="adamw")
    saved_with = replace(base, optim=replace(base.optim, decay_vectors=decay_vectors))
    loaded_with = replace(base, optim=replace(base.optim, decay_vectors=not decay_vectors))
    net = student()
    optimizer = build_optimizer(saved_with, net)
    step(net, optimizer)
    manager = CheckpointManager(tmp_path, Rotation(1), {})
    path = manager.save(Tensors(net, optimizer), TrainState(1, 2), {})
    other = student()
    again = build_optimizer(loaded_with, other)
    manager.load(path, Tensors(other, again))
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)
        assert optimizer.state.get(mine, {}).keys() == again.state.get(theirs, {}).keys()
        for key, value in optimizer.state.get(mine, {}).items():
            assert torch.equal(again.state[theirs][key], value)
