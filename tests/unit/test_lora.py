"""LoRA: what it adds, what it leaves alone, and that it can be folded in exactly."""

import copy

import pytest
import torch
from loralib.layers import Linear as LoraLinear
from torch import Tensor

from kdad_dist.config.methods import LoraConfig
from kdad_dist.errors import ConfigError
from kdad_dist.models.dropout import drop_by
from kdad_dist.models.lora import MARK, add_lora, merge, merged_tensors
from kdad_dist.models.mae import Architecture, MaskedAutoencoder
from kdad_dist.models.masks import random_masks

SMALL = Architecture(4, 32, 2, 4, 16, 3, 2)
BOTH = ["encoder", "decoder"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(SMALL, 16)


def adapted(config: LoraConfig | None = None, seed: int = 0) -> MaskedAutoencoder:
    """With LoRA matrices as they might be after some training."""
    network = plain()
    add_lora(network, config or LoraConfig(), seed, BOTH)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return network


def given() -> tuple[Tensor, Tensor, Tensor]:
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return image, *random_masks(torch.arange(2), 16, 0.5)


def names(network: MaskedAutoencoder) -> set[str]:
    return {name for name, layer in network.named_modules() if isinstance(layer, LoraLinear)}


@torch.no_grad()
def test_a_fresh_lora_changes_nothing_that_the_network_computes() -> None:
    network = plain()
    before = network(*given())
    add_lora(network, LoraConfig(), 0, BOTH)
    assert torch.equal(network(*given()), before)


def test_qkv_and_projection_of_every_block_are_adapted_and_nothing_else() -> None:
    blocks = [f"blocks.{n}" for n in range(2)] + [f"decoder_blocks.{n}" for n in range(3)]
    assert names(adapted()) == {f"{b}.attn.{layer}" for b in blocks for layer in ("qkv", "proj")}


def test_targets_and_parts_choose_what_is_adapted() -> None:
    network = plain()
    config = LoraConfig(targets=["mlp.fc1", "mlp.fc2", "mlp.fc1"])
    add_lora(network, config, 0, ["decoder"])
    assert names(network) == {f"decoder_blocks.{n}.mlp.fc{i}" for n in range(3) for i in (1, 2)}


def test_a_target_that_matches_nothing_is_answered_with_the_layers_that_exist() -> None:
    says = r"'attn.q' is no linear layer[\s\S]*attn.qkv, attn.proj, mlp.fc1, mlp.fc2"
    for target in ("attn.q", "attn", "norm1"):
        with pytest.raises(ConfigError, match=says.replace("attn.q'", f"{target}'")):
            add_lora(plain(), LoraConfig(targets=["attn.qkv", target]), 0, BOTH)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 1.0), (2, 1.0), (4, 8.0)])
@torch.no_grad()
def test_the_update_is_scaled_by_alpha_over_rank(rank: int, alpha: float) -> None:
    layer = adapted(LoraConfig(rank=rank, alpha=alpha)).blocks[0].attn.qkv
    x = torch.randn(5, 32)
    base = x @ layer.weight.T + layer.bias
    update = x @ layer.lora_A.T @ layer.lora_B.T
    assert layer.lora_A.shape == (rank, 32) and layer.lora_B.shape == (96, rank)
    assert torch.allclose(layer(x), base + alpha / rank * update, atol=1e-5)


def test_a_is_drawn_from_the_seed_alone_and_b_is_zero() -> None:
    def matrices(seed: int) -> dict[str, Tensor]:
        network = plain()
        torch.manual_seed(torch.seed())
        before = torch.get_rng_state()
        add_lora(network, LoraConfig(), seed, BOTH)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: p for name, p in network.named_parameters() if MARK in name}

    first, again, other = matrices(0), matrices(0), matrices(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, matrix in first.items():
        if "lora_B" in name:
            assert not matrix.any()
        else:
            assert not torch.equal(matrix, other[name])
            assert 0.8 / matrix.shape[1] ** 0.5 < matrix.abs().max() <= 1 / matrix.shape[1] ** 0.5


def test_the_base_weights_are_frozen_and_the_biases_are_not() -> None:
    network = adapted()
    network(*given()).square().mean().backward()
    for name in names(network):
        layer = network.get_submodule(name)
        assert layer.weight.grad is None
        assert all(p.grad is not None for p in (layer.bias, layer.lora_A, layer.lora_B))


@torch.no_grad()
def test_merged_tensors_are_those_of_a_plain_network_that_computes_the_same() -> None:
    network = adapted()
    tensors = merged_tensors(network)
    twin = plain()
    assert tensors.keys() == twin.state_dict().keys()
    assert not torch.allclose(twin(*given()), network(*given()), atol=1e-2)
    twin.load_state_dict(tensors)
    assert torch.allclose(twin(*given()), network(*given()), atol=2e-6)


@torch.no_grad()
def test_a_network_is_merged_in_place_into_a_plain_one() -> None:
    network = adapted()
    tensors, answer = merged_tensors(network), network(*given())
    merge(network)
    assert network.state_dict().keys() == tensors.keys() == plain().state_dict().keys()
    assert all(torch.equal(tensors[key], value) for key, value in network.state_dict().items())
    assert torch.allclose(network(*given()), answer, atol=2e-6)


@torch.no_grad()
def test_merging_and_evaluating_leave_the_network_as_it_is_to_the_bit() -> None:
    network = adapted()
    before = copy.deepcopy(network.state_dict())
    answer = network.eval()(*given())
    for _ in range(3):
        merged_tensors(network)
        network.eval()
        assert torch.equal(network(*given()), answer)
        network.train()
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def test_lora_upon_merged_weights_goes_on_from_there() -> None:
    first = adapted()
    second = plain()
    second.load_state_dict(merged_tensors(first))
    add_lora(second, LoraConfig(), 5, BOTH)
    assert torch.allclose(second(*given()), first(*given()), atol=2e-6)


def test_a_network_without_lora_merges_to_itself() -> None:
    network = plain()
    tensors = merged_tensors(network)
    assert all(torch.equal(tensors[key], value) for key, value in network.state_dict().items())


@torch.no_grad()
def test_dropout_acts_while_training_and_on_lora_alone() -> None:
    network = adapted(LoraConfig(dropout=0.5))
    drop_by(network.train(), torch.arange(len(given()[0])))
    once = network(*given())
    assert torch.equal(network(*given()), once)
    drop_by(network, 10 + torch.arange(len(given()[0])))
    assert not torch.equal(network(*given()), once)
    assert torch.equal(network.eval()(*given()), network(*given()))
    assert torch.equal(network(*given()), adapted().eval()(*given()))
