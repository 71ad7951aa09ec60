"""Weights of other grids, patches and makers: what is taken, fitted, left aside, or refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdad_dist.config.methods import LoraConfig
from kdad_dist.errors import WeightsError
from kdad_dist.models.lora import add_lora, merged_tensors
from kdad_dist.models.mae import (
    PRESETS,
    Architecture,
    MaskedAutoencoder,
    patchify,
    position_table,
)
from kdad_dist.models.mae_weights import LoadedMae, load_mae

PATCH, SIZE = 4, 24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(
    seed: int = 0, size: int = SIZE, patch: int = PATCH, depth: int = 2, decoder_depth: int = 2
) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(Architecture(patch, 32, depth, 4, 16, decoder_depth, 2), size)


def tensors(**options: Any) -> dict[str, Tensor]:
    """Of a full network, all positions made distinct."""
    given = network(seed=9, **options).state_dict()
    given["pos_embed"] += torch.randn_like(given["pos_embed"])
    return given


def encoder(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in given.items() if not k.startswith(("decoder", "mask_token"))}


def load(target: MaskedAutoencoder, given: dict[str, Tensor], how: Any = "resample") -> LoadedMae:
    return load_mae(target, given, "w.pth", how)


def assert_every_tensor_is_listed_once(report: LoadedMae, target: MaskedAutoencoder) -> None:
    named = [*report.loaded, *report.resized, *report.fresh]
    assert sorted(named) == sorted(target.state_dict())


def test_a_full_file_is_taken_as_it_is() -> None:
    target, given = network(), tensors()
    report = load(target, given)
    assert report.decoder
    assert not (report.resized or report.fresh or report.skipped)
    assert all(torch.equal(value, given[key]) for key, value in target.state_dict().items())
    assert str(report) == f"w.pth: {len(given)} tensors taken as they are"


def test_an_encoder_alone_leaves_the_decoder_at_random_and_says_so() -> None:
    target, given = network(), encoder(tensors())
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = load(target, given)
    assert not report.decoder
    assert_every_tensor_is_listed_once(report, target)
    for key, value in target.state_dict().items():
        assert torch.equal(value, given[key] if key in given else before[key])
    assert set(report.fresh) == before.keys() - given.keys()
    assert "made anew: mask_token, decoder_pos_embed, " in str(report)
    assert "decoder_blocks (24 tensors)" in str(report)


@pytest.mark.parametrize("prefix", ["module.", "student.", "model."])
def test_wrappers_prefixes_do_not_matter(prefix: str) -> None:
    target, given = network(), tensors()
    report = load(target, {prefix + key: value for key, value in given.items()})
    assert report.decoder and not report.skipped
    assert torch.equal(target.norm.weight, given["norm.weight"])


def test_a_classifiers_head_is_left_aside_by_name() -> None:
    head = {"head.weight": torch.ones(3, 32), "fc_norm.bias": torch.ones(32)}
    report = load(network(), encoder(tensors()) | head)
    assert report.skipped == ["head.weight", "fc_norm.bias"]
    assert "of no use here: head.weight, fc_norm.bias" in str(report)


@pytest.mark.parametrize("size", [16, 48])
def test_positions_of_another_grid_are_interpolated_and_the_decoders_computed(size: int) -> None:
    target, given = network(size=size), tensors()
    report = load(target, given)
    assert_every_tensor_is_listed_once(report, target)
    assert report.resized == {"pos_embed": f"grid 6 to {size // 4}"}
    assert report.fresh == ["decoder_pos_embed"]
    table = given["pos_embed"][:, 1:].reshape(1, 6, 6, 32).permute(0, 3, 1, 2)
    wanted = F.interpolate(table, size=(size // 4,) * 2, mode="bicubic", align_corners=False)
    found = target.pos_embed
    assert torch.allclose(found[:, 1:], wanted.flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.equal(found[:, 0], given["pos_embed"][:, 0])
    assert torch.equal(target.decoder_pos_embed, position_table(16, size // 4))
    assert not found.requires_grad


def test_a_smaller_patch_embedding_is_resampled_so_that_enlarged_images_look_the_same() -> None:
    # From 4 to 8 pixels, the enlarged patch has all that the original has (FlexiViT, eq. 4).
    small, large = network(seed=9), network(size=2 * SIZE, patch=8)
    report = load(large, small.state_dict())
    assert report.resized == {"patch_embed.proj.weight": "patch 4 to 8"}
    assert report.fresh == ["decoder_pred.weight", "decoder_pred.bias"]
    patches = torch.rand(7, 3, 4, 4)
    enlarged = F.interpolate(patches, size=(8, 8), mode="bicubic", antialias=True)
    wanted = small.patch_embed(patchify(patches, 4))
    assert torch.allclose(large.patch_embed(patchify(enlarged, 8)), wanted, atol=1e-4)


def test_on_wish_the_patch_embedding_of_another_size_is_random_but_for_its_bias() -> None:
    target, given = network(size=2 * SIZE, patch=8), tensors()
    before = target.patch_embed.proj.weight.clone()
    report = load(target, given, "reinit")
    assert "patch_embed.proj.weight" in report.fresh and not report.resized
    assert torch.equal(target.patch_embed.proj.weight, before)
    assert torch.equal(target.patch_embed.proj.bias, given["patch_embed.proj.bias"])
    assert report.decoder  # its blocks, not its prediction head, decide


def test_half_precision_is_taken_as_float32() -> None:
    target, given = network(), tensors()
    load(target, {key: value.half() for key, value in given.items()})
    assert target.norm.weight.dtype == torch.float32
    assert torch.allclose(target.decoder_pred.weight, given["decoder_pred.weight"], atol=1e-3)


def refusal(target: MaskedAutoencoder, given: dict[str, Tensor]) -> str:
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load(target, given)
    after = target.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "nothing is half loaded"
    return str(caught.value)


def test_what_does_not_fit_is_listed() -> None:
    given = tensors()
    del given["blocks.1.norm1.weight"]
    given["norm.bias"] = torch.zeros(7)
    given["cls_token"] = torch.full((1, 1, 32), torch.nan)
    given["pos_embed"] = torch.zeros(1, 30, 32)
    message = refusal(network(), given)
    assert "w.pth does not fit the network: 4 tensors do not match" in message
    assert "blocks.1.norm1.weight: missing" in message
    assert "norm.bias: shape (7,), needed (32,)" in message
    assert "cls_token: holds NaN" in message
    assert "pos_embed: shape (1, 30, 32), needed (1, 37, 32)" in message
    assert "method.preset" in message


def test_weights_of_another_depth_are_refused() -> None:
    assert "blocks.2.norm1.weight: missing" in refusal(network(depth=3), tensors())
    deeper = refusal(network(), tensors(depth=3))
    assert "blocks.2.norm1.weight: no such tensor in the network" in deeper
    assert "decoder_blocks.2.norm1.weight: missing" in refusal(network(decoder_depth=3), tensors())


def test_the_preset_that_the_weights_are_of_is_named() -> None:
    tiny = MaskedAutoencoder(PRESETS["mae_vit_tiny_patch8"], 16)
    message = refusal(network(), tiny.state_dict())
    assert "their encoder is that of mae_vit_tiny_patch8" in message
    assert "and " in message and "more" in message


def test_layers_that_a_block_does_not_have_here_are_refused() -> None:
    message = refusal(network(), tensors() | {"blocks.0.ls1.gamma": torch.ones(32)})
    assert "blocks.0.ls1.gamma: no such tensor in the network" in message


def test_lora_that_was_not_folded_in_is_refused_and_folded_in_is_taken() -> None:
    source = network(seed=9)
    add_lora(source, LoraConfig(), 0, ["encoder", "decoder"])
    assert "kdad export" in refusal(network(), source.state_dict())
    assert load(network(), merged_tensors(source)).decoder
