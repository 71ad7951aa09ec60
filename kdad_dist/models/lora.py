"""Low-rank adaptation (Hu et al., ICLR 2022) of linear layers: W x + alpha / rank * B A x."""

import math
from collections.abc import Mapping, Sequence

import torch
from loralib.layers import Linear as LoraLinear
from torch import Tensor, nn

from kdad_dist.config.methods import LoraConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError
from kdad_dist.models.dropout import RowDropout
from kdad_dist.models.mae import MaskedAutoencoder

MARK = "lora_"
"""What the names of the matrices A and B begin with."""


def blocks_of(network: MaskedAutoencoder) -> dict[str, nn.ModuleList]:
    """The blocks of each part that `method.lora.parts` may name."""
    return {"encoder": network.blocks, "decoder": network.decoder_blocks}


def add_lora(
    network: MaskedAutoencoder, config: LoraConfig, seed: int, parts: Sequence[str]
) -> None:
    """Replaces the target layers in all blocks of the parts; what the network computes stays.

    Their weights are frozen, their biases are not (as loralib does). A is drawn from `seed`, B is
    zero.

    Raises:
        ConfigError: a target is no linear layer of a block.
    """
    blocks = [block for part in parts for block in blocks_of(network)[part]]
    with seeded(seed, "lora"):
        for block in blocks:
            for target in dict.fromkeys(config.targets):
                _adapt(block, target, config)


def _adapt(block: nn.Module, target: str, config: LoraConfig) -> None:
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    if target not in linears:
        raise ConfigError(
            f"method.lora.targets: {target!r} is no linear layer of a block",
            f"name some of {', '.join(linears)}",
        )
    linear = linears[target]
    with torch.device("meta"):  # without weights of its own, which would be drawn for nothing
        layer = LoraLinear(
            linear.in_features,
            linear.out_features,
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - any number will do
            # Merging in eval mode would change the frozen weights a little every time.
            merge_weights=False,
        )
    layer.lora_dropout = RowDropout(config.dropout)  # pyright: ignore
    weight = linear.weight.requires_grad_(False)
    layer.weight, layer.bias = linear.weight, linear.bias
    layer.lora_A = nn.Parameter(weight.new_empty(config.rank, linear.in_features))
    layer.lora_B = nn.Parameter(weight.new_zeros(linear.out_features, config.rank))
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    block.set_submodule(target, layer)


def merge(network: nn.Module) -> None:
    """Puts alpha / rank * B A into the weights themselves: the network is one without LoRA."""
    load_merged(network, merged_tensors(network))


def load_merged(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes it a network without LoRA that has these tensors, all that it needs and no others."""
    for name, layer in layers(network).items():
        bias = layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
        network.set_submodule(name, plain)
    network.load_state_dict(tensors, assign=True)


def merged_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the same network without LoRA, whose weights hold alpha / rank * B A.

    The network itself is left as it is. Sums are taken in float64.
    """
    tensors = dict(network.state_dict())
    for name, layer in layers(network).items():
        a, b = (tensors.pop(f"{name}.{MARK}{matrix}").double() for matrix in "AB")
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = (weight.double() + layer.scaling * b @ a).to(weight.dtype)
    return tensors


def layers(network: nn.Module) -> dict[str, LoraLinear]:
    """The layers that LoRA adapts, by their names."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LoraLinear)}
