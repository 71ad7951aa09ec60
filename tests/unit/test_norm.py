"""GlobalBatchNorm in one process is torch's BatchNorm, and it replaces nothing that it cannot."""

import copy

import pytest
import torch
from torch import nn

from kdad_dist.errors import ConfigError
from kdad_dist.models.norm import GlobalBatchNorm, convert_batchnorm


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))


def train(net: nn.Module, steps: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    net.eval()
    return [
        net(torch.randn(2, 3, 8, 8)),
        *net.state_dict().values(),
        *(p.grad for p in net.parameters() if p.grad is not None),
    ]


def test_in_one_process_it_is_bitwise_torch_batchnorm():
    plain = small_net()
    converted = convert_batchnorm(copy.deepcopy(plain))
    assert all(torch.equal(a, b) for a, b in zip(train(plain, 3), train(converted, 3), strict=True))


def test_names_and_values_of_parameters_and_buffers_stay():
    plain = small_net()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    converted = convert_batchnorm(plain)
    after = converted.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(isinstance(layer, GlobalBatchNorm) for layer in converted.modules()) == 2


def test_converting_twice_is_converting_once():
    net = convert_batchnorm(convert_batchnorm(small_net()))
    assert all(torch.equal(a, b) for a, b in zip(train(net, 2), train(small_net(), 2), strict=True))


@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm1d, (6, 5, 4))])
def test_rows_and_sequences_are_normalised_too(kind: type[nn.Module], shape: tuple[int, ...]):
    x = torch.randn(shape)
    assert torch.equal(convert_batchnorm(kind(5))(x), kind(5)(x))


def test_a_layer_that_also_drops_and_activates_keeps_doing_so():
    timm_layers = pytest.importorskip("timm.layers")
    plain = timm_layers.BatchNormAct2d(5)
    converted = convert_batchnorm(copy.deepcopy(plain))
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(converted(x), plain(x))
    assert converted(x).min() == 0


def test_a_batchnorm_of_unknown_kind_is_refused_by_name():
    class Odd(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(5)
            self.extra = nn.Linear(5, 5)

    with pytest.raises(ConfigError, match=r"layer 0 is a Odd"):
        convert_batchnorm(nn.Sequential(Odd()))
