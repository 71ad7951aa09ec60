"""The masked autoencoder: what it looks at, in which order, and what it costs."""

import pytest
import torch
from torch import Tensor

from kdad_dist.models.mae import Architecture, MaskedAutoencoder, patchify, unpatchify
from kdad_dist.models.masks import random_masks

SMALL = Architecture(4, 32, 2, 4, 16, 2, 2)
SIZE = 24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def network() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(SMALL, SIZE)


def given(images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.rand(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return image, *random_masks(torch.arange(images), 36, 0.75)


def test_a_patch_is_laid_out_by_row_column_and_channel() -> None:
    image = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    patches = patchify(image, 4)
    assert patches.shape == (2, 4, 48)
    for number in range(4):
        top, left = number // 2 * 4, number % 2 * 4
        window = image[1, :, top : top + 4, left : left + 4]
        expected = [window[c, i, j] for i in range(4) for j in range(4) for c in range(3)]
        assert patches[1, number].tolist() == expected


@pytest.mark.parametrize(("size", "patch"), [(8, 4), (21, 7), (12, 1), (5, 5)])
@pytest.mark.parametrize("images", [0, 2])
def test_patches_go_back_to_the_image(size: int, patch: int, images: int) -> None:
    image = torch.rand(images, 3, size, size)
    assert torch.equal(unpatchify(patchify(image, patch), patch), image)
    assert torch.equal(unpatchify(patchify(image[:, :1], patch), patch), image[:, :1])


@torch.no_grad()
def test_what_is_hidden_is_not_seen(network: MaskedAutoencoder) -> None:
    image, visible, hidden = given()
    patches = patchify(image, 4).scatter(1, hidden[:, :, None].expand(-1, -1, 48), torch.nan)
    spoilt = unpatchify(patches, 4)
    assert torch.equal(network(spoilt, visible, hidden), network(image, visible, hidden))
    assert torch.equal(network.encode(spoilt, visible), network.encode(image, visible))


@torch.no_grad()
def test_what_is_visible_is_seen(network: MaskedAutoencoder) -> None:
    image, visible, _ = given()
    before = network.encode(image, visible)
    for place in range(visible.shape[1]):
        patches = patchify(image, 4).clone()
        patches[0, visible[0, place]] += 1
        changed = network.encode(unpatchify(patches, 4), visible)
        assert not torch.allclose(changed[0], before[0], atol=1e-4)
        assert torch.equal(changed[1:], before[1:])


@torch.no_grad()
def test_the_order_of_the_patches_changes_nothing_but_the_order_of_the_answer(
    network: MaskedAutoencoder,
) -> None:
    image, visible, hidden = given()
    turned = network(image, visible.flip(1), hidden.flip(1)).flip(1)
    assert torch.allclose(turned, network(image, visible, hidden), atol=1e-5)


@torch.no_grad()
def test_an_image_is_the_same_alone_and_among_others(network: MaskedAutoencoder) -> None:
    image, visible, hidden = given()
    together = network(image, visible, hidden)
    for n in range(3):
        one = slice(n, n + 1)
        assert torch.allclose(
            network(image[one], visible[one], hidden[one])[0], together[n], atol=1e-5
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_of_no_images_gives_every_trained_parameter_a_gradient_of_zero(
    checkpointing: bool,
) -> None:
    network = MaskedAutoencoder(SMALL, SIZE, checkpointing)
    image, visible, hidden = given()
    predicted = network(image[:0], visible[:0], hidden[:0])
    assert predicted.shape == (0, 27, 48)
    predicted.sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_every_trained_parameter_has_a_gradient_and_the_positions_have_none(
    network: MaskedAutoencoder,
) -> None:
    network(*given()).square().mean().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize("images", [0, 1, 3])
def test_gradients_lie_in_memory_as_their_parameters_do(
    network: MaskedAutoencoder, images: int
) -> None:
    network(*given(images)).square().sum().backward()
    for name, p in network.named_parameters():  # DDP warns where they do not
        assert p.grad is None or p.grad.stride() == p.stride(), name


def test_activation_checkpointing_changes_no_gradient_and_computes_blocks_twice() -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = MaskedAutoencoder(SMALL, SIZE, checkpointing).train()
        network.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        network(*given()).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
        calls.append(0)
    assert calls == [1, 0, 1, 1, 0]
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_it_runs_under_bf16_autocast(network: MaskedAutoencoder) -> None:
    exact = network(*given())
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(*given())
    assert torch.allclose(rough.float(), exact, atol=0.05)


def test_tokens_have_the_shapes_by_which_weight_decay_tells_them_from_biases(
    network: MaskedAutoencoder,
) -> None:
    assert network.cls_token.shape == (1, 1, 32)
    assert network.mask_token.shape == (1, 1, 16)
    vectors = {name for name, p in network.named_parameters() if p.dim() < 2}
    assert all(name.endswith("bias") or "norm" in name for name in vectors)


def test_the_first_weights_have_the_papers_ranges(network: MaskedAutoencoder) -> None:
    for name, p in network.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not p.any(), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        elif p.dim() in (2, 4):
            rows, columns = p.flatten(1).shape
            limit = (6 / (rows + columns)) ** 0.5
            assert 0.9 * limit < p.abs().max() <= limit, name
    assert 0.01 < network.cls_token.std() < 0.03
