"""The masked autoencoder equals its papers: counts, positions, and a slow forward pass."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdad_dist.config.methods import LoraConfig, LoraMaeConfig
from kdad_dist.models.lora import MARK, add_lora
from kdad_dist.models.mae import PRESETS, Architecture, MaskedAutoencoder, position_table
from kdad_dist.models.mae_build import build_mae
from kdad_dist.models.masks import random_masks

SMALL = Architecture(4, 32, 2, 4, 16, 2, 2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def on_no_device(**options: Any) -> MaskedAutoencoder:
    """The network without memory for its weights."""
    with torch.device("meta"):
        options = {"freeze_random": True, **options}
        return build_mae(LoraMaeConfig(weights="random", **options), 224, seed=0)


def count(network: nn.Module, trained: bool = False, name: str = "") -> int:
    return sum(
        p.numel()
        for key, p in network.named_parameters()
        if name in key and (p.requires_grad or not trained)
    )


def test_large_patch7_with_rank_4_has_the_originals_parameters() -> None:
    frozen = on_no_device()
    assert count(frozen) == 330_547_347
    assert count(frozen, name=MARK) == 688_128
    assert count(frozen, trained=True, name=MARK) == 688_128
    assert count(frozen, trained=True) == 1_444_499
    assert count(on_no_device(freeze_non_lora=False), trained=True) == 219_921_043


def test_the_frozen_network_trains_what_the_original_does() -> None:
    network = on_no_device()
    groups: dict[str, int] = {}
    for key, p in network.named_parameters():
        if p.requires_grad:
            name = key.partition(".")[0]
            groups[name] = groups.get(name, 0) + p.numel()
    assert groups == {
        "cls_token": 1_024,
        "mask_token": 512,
        "patch_embed": 151_552,
        "blocks": 589_824,
        "norm": 2_048,
        "decoder_embed": 524_800,
        "decoder_blocks": 98_304,
        "decoder_norm": 1_024,
        "decoder_pred": 75_411,
    }


def test_without_lora_everything_but_the_positions_is_trained() -> None:
    network = on_no_device(lora=None, freeze_non_lora=False, freeze_random=False)
    still = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert still == {"pos_embed", "decoder_pos_embed"}
    assert count(network) == 330_547_347 - 688_128


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_built_and_run(preset: str) -> None:
    network = on_no_device(preset=preset)
    image = torch.empty(2, 3, 224, 224, device="meta")
    order = torch.empty(2, network.patches, dtype=torch.int64, device="meta")
    keep = network.patches // 4
    predicted = network(image, order[:, :keep], order[:, keep:])
    assert predicted.shape == (2, network.patches - keep, 3 * network.patch**2)


def test_base_and_huge_have_the_published_sizes() -> None:
    # Millions, without a classifier (Dosovitskiy et al. 2021, table 1, with one: 86, 307, 632).
    for preset, millions in [
        ("mae_vit_base_patch16", 86),
        ("mae_vit_large_patch16", 303),
        ("mae_vit_huge_patch14", 631),
    ]:
        encoder = [
            p.numel()
            for key, p in on_no_device(preset=preset).named_parameters()
            if not key.startswith(("decoder", "mask")) and MARK not in key
        ]
        assert sum(encoder) / 1e6 == pytest.approx(millions, abs=1)


def test_positions_are_sines_and_cosines_of_the_column_and_then_of_the_row() -> None:
    dim, grid = 24, 5
    table = position_table(dim, grid)
    assert table.shape == (1, 26, dim)
    assert not table[0, 0].any()
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place * 10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = table[0, 1 + row * grid + column]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def slow_forward(network: MaskedAutoencoder, image: Tensor, order: Tensor, keep: int) -> Tensor:
    """As MAE does it: embed all, shuffle, drop, decode, unshuffle; one image, in plain formulas."""
    tensors = network.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        out = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        if f"{name}.lora_A" in tensors:
            out += (x @ tensors[f"{name}.lora_A"].T @ tensors[f"{name}.lora_B"].T) * (1 / 4)
        return out

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        scaled = (x - mean) / (var + 1e-6).sqrt()
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def block(x: Tensor, name: str, heads: int) -> Tensor:
        dim = x.shape[1]
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(dim, dim=1)
        outs = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(dim // heads)).softmax(dim=1)
            outs.append(weights @ v[:, part])
        x = x + linear(torch.cat(outs, dim=1), f"{name}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + linear(inner, f"{name}.mlp.fc2")

    p = network.patch
    embedded = F.conv2d(image[None], tensors["patch_embed.proj.weight"], None, p)[0].flatten(1).T
    embedded = embedded + tensors["patch_embed.proj.bias"] + tensors["pos_embed"][0, 1:]
    cls = tensors["cls_token"][0] + tensors["pos_embed"][0, :1]
    x = torch.cat([cls, embedded[order[:keep]]])
    for n in range(SMALL.depth):
        x = block(x, f"blocks.{n}", SMALL.heads)
    x = linear(norm(x, "norm"), "decoder_embed")
    missing = tensors["mask_token"][0].expand(len(order) - keep, -1)
    restore = order.argsort()
    unshuffled = torch.cat([x[1:], missing])[restore]
    x = torch.cat([x[:1], unshuffled]) + tensors["decoder_pos_embed"][0]
    for n in range(SMALL.decoder_depth):
        x = block(x, f"decoder_blocks.{n}", SMALL.decoder_heads)
    return linear(norm(x, "decoder_norm"), "decoder_pred")[1:]


@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_the_forward_pass_is_that_of_mae_with_each_image_in_its_own_order(lora: bool) -> None:
    torch.manual_seed(0)
    network = MaskedAutoencoder(SMALL, 24)
    if lora:
        add_lora(network, LoraConfig(), 0, ["encoder", "decoder"])
    for parameter in network.parameters():  # zeros and ones would hide a mistake
        parameter.add_(torch.randn_like(parameter) * 0.05)
    image = torch.randn(3, 3, 24, 24)
    visible, hidden = random_masks(torch.tensor([5, 6, 7]), network.patches, 0.75)
    found = network(image, visible, hidden)
    for number in range(3):
        order = torch.cat([visible[number], hidden[number]])
        expected = slow_forward(network, image[number], order, visible.shape[1])
        assert torch.allclose(found[number], expected[hidden[number]], atol=1e-5)


@torch.no_grad()
def test_the_encoder_is_timms_vision_transformer() -> None:
    from timm.models.vision_transformer import VisionTransformer

    from kdad_dist.models.mae_weights import load_mae

    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=24, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3
    ).eval()
    network = MaskedAutoencoder(SMALL, 24).eval()
    load_mae(network, vit.state_dict(), "timm", "resample")
    image = torch.randn(2, 3, 24, 24)
    everything = torch.arange(36).expand(2, -1)
    assert torch.allclose(network.encode(image, everything), vit.forward_features(image), atol=1e-5)
