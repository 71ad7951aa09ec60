"""The masked autoencoder equals its papers: losses, masks and maps, against slow loops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdad_dist.config.methods import InferenceConfig, LoraConfig, LoraMaeConfig
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.models.tokens import IMAGENET
from kdad_dist.types import Batch

SIZE, PATCH, GRID = 32, 8, 4
TINY = LoraMaeConfig(preset="mae_vit_tiny_patch8", weights="random", freeze_random=True)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def batch(count: int, first: int = 0) -> Batch:
    number = torch.arange(first, first + count)
    return Batch(images(first + count)[first:], number, 1000 + number)


def normalised(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return (image - mean) / std


class Recall(torch.nn.Module):
    """Stands in for a student that has learnt the very images that it is shown."""

    def __init__(self, method: LoraMae, known: Tensor, norm_pix: bool) -> None:
        super().__init__()
        self.method, self.known, self.norm_pix = method, normalised(known), norm_pix

    def forward(self, image: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        rows = []
        for shown, ids in zip(image, hidden, strict=True):
            match = next(k for k in self.known if torch.allclose(k, shown, atol=1e-5))
            rows.append(torch.stack([self.patch(match, int(i)) for i in ids]))
        return torch.stack(rows)

    def patch(self, image: Tensor, number: int) -> Tensor:
        row, column = divmod(number, GRID)
        cut = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        values = cut.permute(1, 2, 0).flatten()
        if self.norm_pix:
            values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
        return values


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_is_that_of_a_loop_over_the_hidden_patches(norm_pix):
    method = LoraMae(replace(TINY, norm_pix_loss=norm_pix), SIZE, seed=0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    student = method.student
    student.register_forward_hook(lambda _, given, out: seen.append((*given[1:], out)))
    losses = method(batch(3))["loss"]
    [(visible, hidden, predicted)] = seen
    assert hidden.shape == (3, 12) and visible.shape == (3, 4)
    recall = Recall(method, images(3), norm_pix)
    for number, image in enumerate(normalised(images(3))):
        errors = []
        for place, patch in enumerate(hidden[number].tolist()):
            target = recall.patch(image, patch)
            errors += [
                (target[i] - predicted[number, place, i]).item() ** 2 for i in range(len(target))
            ]
        assert losses[number].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_mask_of_an_image_depends_on_its_seed_and_not_on_its_batch():
    method = LoraMae(TINY, SIZE, seed=0)
    together = method(batch(4))["loss"]
    alone = torch.cat([method(batch(1, first=i))["loss"] for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-5)
    other = replace_seed(batch(4))
    assert not torch.allclose(together, method(other)["loss"], rtol=1e-3)


def replace_seed(given: Batch) -> Batch:
    return replace(given, seed=given.seed + 50)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_training_mask_ratio_is_honoured(ratio):
    method = LoraMae(replace(TINY, mask_ratio=ratio), SIZE, seed=0)
    shapes = []
    method.student.register_forward_hook(lambda _, given, out: shapes.append(out.shape))
    method(batch(2))
    assert shapes[0][1] == int(16 * ratio)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("error", ["normalised", "pixel"])
@pytest.mark.parametrize("pattern", ["stripes", "diagonal", "lattice", "random"])
def test_a_perfect_reconstruction_scores_zero(norm_pix, error, pattern):
    inference = InferenceConfig(error=error, pattern=pattern)
    method = LoraMae(replace(TINY, norm_pix_loss=norm_pix, inference=inference), SIZE, seed=0)
    known = images(2)
    method.student = Recall(method, known, norm_pix)
    prediction = method.predict(known)
    assert prediction.anomaly_map.shape == (2, SIZE, SIZE)
    assert prediction.anomaly_map.max() < 1e-8
    assert torch.allclose(prediction.reconstruction, known, atol=1e-4)


@pytest.mark.parametrize("inference", [
    InferenceConfig(),
    InferenceConfig(pattern="diagonal", error="pixel"),
    InferenceConfig(pattern="lattice", map="patch"),
    InferenceConfig(pattern="random", partitions=2, masks=8),
])  # fmt: skip
@torch.no_grad()
def test_a_map_is_that_of_one_mask_and_one_image_at_a_time(inference):
    method = LoraMae(replace(TINY, inference=inference), SIZE, seed=3).eval()
    found = method.predict(images(2)).anomaly_map
    slow = torch.zeros(2, SIZE, SIZE)
    recall = Recall(method, images(2), norm_pix=False)
    for number, image in enumerate(normalised(images(2))):
        for partition in method.hidden:
            for hidden in partition:
                visible = torch.tensor([i for i in range(16) if i not in hidden.tolist()])
                predicted = method.student(image[None], visible[None], hidden[None])[0]
                for values, patch in zip(predicted, hidden.tolist(), strict=True):
                    target = recall.patch(image, patch)
                    deviation = (target.var() + 1e-6).sqrt()
                    error = values - (target - target.mean()) / deviation
                    if inference.error == "pixel":
                        error = error * deviation
                    square = error.square().view(PATCH, PATCH, 3).mean(dim=2)
                    if inference.map == "patch":
                        square = square.mean().expand(PATCH, PATCH)
                    row, column = divmod(patch, GRID)
                    slow[
                        number,
                        row * PATCH : (row + 1) * PATCH,
                        column * PATCH : (column + 1) * PATCH,
                    ] += square / len(method.hidden)
    assert torch.allclose(found, slow, rtol=1e-4, atol=1e-6)


def test_all_masks_of_a_batch_go_through_the_student_at_once():
    method = LoraMae(TINY, SIZE, seed=0)
    shapes = []
    method.student.register_forward_hook(lambda _, given, out: shapes.append(given[1].shape))
    method.predict(images(3))
    assert shapes == [(3 * 4, 12)]  # three quarters of the patches are visible


def test_a_batch_without_images_has_losses_and_gradients_of_none():
    method = LoraMae(TINY, SIZE, seed=0)
    losses = method(batch(0))["loss"]
    assert losses.shape == (0,)
    losses.sum().backward()
    trained = [p for p in method.student.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_only_what_is_trained_receives_a_gradient():
    lora = LoraConfig(rank=2, targets=["attn.qkv"], parts=["encoder"])
    method = LoraMae(replace(TINY, lora=lora), SIZE, seed=0)
    method(batch(2))["loss"].sum().backward()
    for name, parameter in method.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    in_blocks = [
        n for n, p in method.student.named_parameters() if p.requires_grad and "blocks." in n
    ]
    assert in_blocks and all("lora_" in n and n.startswith("blocks.") for n in in_blocks)
