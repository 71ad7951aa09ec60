"""From configuration to network: weights from each source, what is trained, and bad input."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from kdad_dist.config.methods import LoraConfig, LoraMaeConfig
from kdad_dist.errors import ConfigError, WeightsError
from kdad_dist.models.lora import MARK, merged_tensors
from kdad_dist.models.mae import PRESETS, Architecture, MaskedAutoencoder
from kdad_dist.models.mae_build import build_mae
from tests.methods import weights_hash

SMALL = Architecture(4, 32, 2, 4, 16, 2, 2)
SIZE = 24
RANDOM = LoraMaeConfig(preset="small", weights="random", freeze_random=True)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(PRESETS, "small", SMALL)
    monkeypatch.setitem(PRESETS, "mae_vit_large_patch8", replace(SMALL, patch=8))


def encoder_of(network: nn.Module) -> dict[str, torch.Tensor]:
    kept = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
    return {k: v for k, v in network.state_dict().items() if k.startswith(kept)}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A file as MAE's training writes it."""
    torch.manual_seed(3)
    content = {"model": MaskedAutoencoder(SMALL, SIZE).state_dict(), "epoch": 7}
    torch.save(content | {"args": argparse.Namespace(lr=0.1)}, tmp_path / "full.pth")
    return tmp_path / "full.pth"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    torch.save({"model": encoder_of(MaskedAutoencoder(SMALL, SIZE))}, tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def from_file(path: Path, **options: Any) -> LoraMaeConfig:
    return LoraMaeConfig(preset="small", weights=str(path), **options)


def trained(network: MaskedAutoencoder, start: str) -> set[str]:
    """Names of the trained tensors of the blocks that begin so, without the block's number."""
    return {
        name.split(".", 2)[2]
        for name, p in network.named_parameters()
        if name.startswith(f"{start}.") and p.requires_grad
    }


LORA = {f"attn.{layer}.lora_{matrix}" for layer in ("qkv", "proj") for matrix in "AB"}
WHOLE = {
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}


def test_full_weights_are_adapted_by_lora_alone(full: Path) -> None:
    network = build_mae(from_file(full), SIZE, 0)
    assert trained(network, "blocks") == trained(network, "decoder_blocks") == LORA
    outside = {
        name for name, p in network.named_parameters() if p.requires_grad and "blocks" not in name
    }
    assert outside == {
        "cls_token",
        "mask_token",
        *(
            f"{layer}.{kind}"
            for layer in (
                "patch_embed.proj",
                "norm",
                "decoder_embed",
                "decoder_norm",
                "decoder_pred",
            )
            for kind in ("weight", "bias")
        ),
    }


def test_no_gradient_is_computed_for_what_is_frozen(full: Path) -> None:
    network = build_mae(from_file(full), SIZE, 0)
    everything = torch.arange(36).expand(2, -1)
    network(torch.rand(2, 3, SIZE, SIZE), everything[:, :9], everything[:, 9:]).sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_decoder_without_weights_is_trained_in_full_and_that_is_said_once(
    encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kdad_dist"):
        network = build_mae(from_file(encoder), SIZE, 0)
    assert trained(network, "blocks") == LORA
    assert trained(network, "decoder_blocks") == WHOLE
    says = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in says] == [
        f"weights {encoder}",
        "the blocks of the decoder are random",
    ]
    assert "30 tensors taken as they are" in says[0]
    assert "decoder_blocks (24 tensors)" in says[0]


def test_who_insists_freezes_a_random_decoder(encoder: Path) -> None:
    network = build_mae(from_file(encoder, freeze_random=True), SIZE, 0)
    assert trained(network, "decoder_blocks") == LORA


def test_without_freezing_all_but_the_adapted_weights_is_trained(full: Path) -> None:
    network = build_mae(from_file(full, freeze_non_lora=False), SIZE, 0)
    adapted = {"attn.qkv.weight", "attn.proj.weight"}
    assert trained(network, "blocks") == (WHOLE | LORA) - adapted


def test_without_lora_everything_is_trained(full: Path) -> None:
    network = build_mae(from_file(full, lora=None, freeze_non_lora=False), SIZE, 0)
    assert trained(network, "blocks") == trained(network, "decoder_blocks") == WHOLE
    assert not any(MARK in name for name in network.state_dict())


def test_lora_in_one_part_freezes_the_other_too(full: Path) -> None:
    network = build_mae(from_file(full, lora=LoraConfig(parts=["encoder"])), SIZE, 0)
    assert trained(network, "blocks") == LORA
    assert trained(network, "decoder_blocks") == set()


@pytest.mark.parametrize("parts", [["decoder"], ["encoder", "decoder"]])
def test_lora_upon_nothing_but_random_weights_is_refused(encoder: Path, parts: list) -> None:
    config = from_file(encoder, lora=LoraConfig(parts=parts), freeze_non_lora=False)
    if "encoder" in parts:
        config = replace(config, weights="random")
    with pytest.raises(ConfigError, match=r"weights are random[\s\S]*freeze_random=true"):
        build_mae(config, SIZE, 0)
    assert build_mae(replace(config, freeze_random=True), SIZE, 0)


def test_random_weights_follow_the_seed_and_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    hashes = [weights_hash(build_mae(RANDOM, SIZE, seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_export_of_a_run_is_where_another_begins(tmp_path: Path) -> None:
    first = build_mae(RANDOM, SIZE, 0)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_file(merged_tensors(first), tmp_path / "student.safetensors")
    second = build_mae(from_file(tmp_path / "student.safetensors"), SIZE, 1)
    everything = torch.arange(36).expand(2, -1)
    given = torch.rand(2, 3, SIZE, SIZE), everything[:, :9], everything[:, 9:]
    with torch.no_grad():
        assert torch.allclose(second(*given), first(*given), atol=2e-6)
    assert trained(second, "decoder_blocks") == LORA


def test_the_hubs_encoder_comes_from_its_cache_to_another_patch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "models--timm--vit_large_patch16_224.mae"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    torch.manual_seed(3)
    source = encoder_of(MaskedAutoencoder(SMALL, SIZE))
    save_file(source, folder / "snapshots/abc/model.safetensors")
    config = LoraMaeConfig(preset="mae_vit_large_patch8", weights="pretrained")
    network = build_mae(config, 64, 0)
    assert torch.equal(network.blocks[1].mlp.fc1.weight, source["blocks.1.mlp.fc1.weight"])
    assert network.patch_embed.proj.weight.shape[-1] == 8
    assert network.pos_embed.shape == (1, 65, 32)
    assert trained(network, "decoder_blocks") == WHOLE


def test_an_unreachable_hub_names_the_key_of_this_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    says = r"timm/vit_large_patch16_224.mae are not in [\s\S]*method.weights=FILE.safetensors"
    with pytest.raises(WeightsError, match=says):
        build_mae(LoraMaeConfig(preset="mae_vit_large_patch8"), SIZE, 0)


def test_a_preset_that_nobody_has_trained_has_no_pretrained_weights() -> None:
    with pytest.raises(ConfigError, match=r"nobody has published weights of small[\s\S]*random"):
        build_mae(LoraMaeConfig(preset="small", weights="pretrained"), SIZE, 0)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mae_pretrain_vit_large_full.pth", "pretrain"),
        ("mae_pretrain_vit_base.pth", "pretrain"),
        ("mae_visualize_vit_huge.pth", "visualize"),
    ],
)
def test_a_missing_file_of_maes_authors_is_answered_with_its_address(
    tmp_path: Path, name: str, folder: str
) -> None:
    says = rf"there is no file .*{name}[\s\S]*https://dl.fbaipublicfiles.com/mae/{folder}/{name}"
    with pytest.raises(WeightsError, match=says):
        build_mae(from_file(tmp_path / name), SIZE, 0)


def test_a_missing_file_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights file .*x.pth[\s\S]*check method.weights"):
        build_mae(from_file(tmp_path / "x.pth"), SIZE, 0)


def test_a_missing_export_is_answered_with_the_command_that_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "runs/base/export/student.safetensors"
    with pytest.raises(WeightsError, match=r"`kdad export .*runs/base` writes it"):
        build_mae(from_file(file), SIZE, 0)


@pytest.mark.parametrize(
    ("options", "size", "says"),
    [
        ({}, 26, r"26, which is no multiple of the 4 pixels[\s\S]*nearest .*: 24 and 28"),
        ({}, 3, r"nearest sizes that are: 4$"),
        ({"preset": "mae_vit_large_patch77"}, SIZE, r"did you mean .*mae_vit_large_patch7"),
        ({"preset": "resnet"}, SIZE, r"use one of .*mae_vit_tiny_patch8"),
        ({"mask_ratio": 0.99}, SIZE, r"mask_ratio 0.99 leaves 0 of 36 patches visible"),
        ({"lora": LoraConfig(targets=["qkv"])}, SIZE, r"'qkv' is no linear layer"),
    ],
)
def test_bad_values_are_answered_with_good_ones(options: dict, size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_mae(replace(RANDOM, **options), size, 0)


def test_one_patch_leaves_nothing_to_hide_or_nothing_to_see() -> None:
    with pytest.raises(ConfigError, match="leaves 0 of 1 patches visible"):
        build_mae(RANDOM, 4, 0)
