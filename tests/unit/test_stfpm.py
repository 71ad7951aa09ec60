"""STFPM as the trainer meets it: gradients, short batches, cached targets, reduced precision."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdad_dist import config as configuration
from kdad_dist.config_methods import StfpmConfig, TeacherConfig
from kdad_dist.methods import build_method
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.models.weights import weights_hash
from kdad_dist.types import Batch


def make(backbone: str = "test_resnet", **options: object) -> Stfpm:
    torch.set_num_threads(1)
    return Stfpm(StfpmConfig(teacher=TeacherConfig(backbone, "random", [1, 2]), **options), seed=0)


def batch(count: int, seed: int = 0) -> Batch:
    image = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    row = torch.arange(count)
    return Batch(image.contiguous(memory_format=torch.channels_last), row, row)


def gradients(method: Stfpm, losses: dict[str, Tensor]) -> list[Tensor]:
    method.zero_grad()
    losses["loss"].sum().backward()
    return [p.grad for p in method.student.parameters()]


def test_gradients_reach_every_weight_of_the_student_and_none_of_the_teacher() -> None:
    method = make()
    # timm starts each residual branch at zero, so what lies inside one moves from the second step.
    gradients(method, method(batch(2)))
    torch.optim.SGD(method.student.parameters(), lr=0.1).step()
    assert all(g is not None and g.any() for g in gradients(method, method(batch(2))))
    assert all(p.grad is None for p in method.teacher.parameters())


def test_training_mode_never_reaches_the_teacher() -> None:
    method = make()
    before = weights_hash(method.teacher)
    method.train()
    method(batch(2))
    assert method.student.training and not method.teacher.training
    assert weights_hash(method.teacher) == before


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_no_loss_and_zero_gradients(
    backbone: str, precision: torch.dtype
) -> None:
    method = make(backbone)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        losses = method(batch(0))
    assert {key: tuple(value.shape) for key, value in losses.items()} == {
        "loss": (0,),
        "layer1": (0,),
        "layer2": (0,),
    }
    assert all(g is not None and not g.any() for g in gradients(method, losses))
    assert method.predict(batch(0).image).anomaly_map.shape == (0, 64, 64)


@pytest.mark.parametrize("normalize", [True, False])
def test_cached_targets_give_the_same_loss_without_the_teacher(normalize: bool) -> None:
    method = make(normalize=normalize)
    here = batch(3)
    expected = method(here)["loss"]
    targets = method.targets(here.image)
    assert not any(t.requires_grad for t in targets)
    method.teacher.network = torch.nn.Identity()
    assert torch.equal(method(Batch(here.image, here.row, here.seed, targets))["loss"], expected)


def test_losses_are_of_each_image_alone() -> None:
    method = make().eval()
    both = method(batch(2))["loss"]
    first = method(Batch(batch(2).image[:1], torch.arange(1), torch.arange(1)))["loss"]
    torch.testing.assert_close(first, both[:1])


def test_losses_and_maps_are_float32_under_bf16_and_near_the_exact_ones() -> None:
    method = make().eval()
    exact, exact_map = method(batch(2))["loss"], method.predict(batch(2).image).anomaly_map
    with torch.autocast("cpu", torch.bfloat16):
        losses, prediction = method(batch(2)), method.predict(batch(2).image)
    assert losses["loss"].dtype == prediction.anomaly_map.dtype == torch.float32
    torch.testing.assert_close(losses["loss"], exact, rtol=0.02, atol=0)
    torch.testing.assert_close(prediction.anomaly_map, exact_map, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("combine", ["product", "sum", "sum_per_area"])
def test_maps_are_not_negative_and_of_the_images_size(combine: str) -> None:
    maps = make(combine=combine).eval().predict(batch(2).image[..., :48]).anomaly_map
    assert maps.shape == (2, 64, 48)
    assert maps.min() >= 0 and maps.max() > 0


def test_a_step_in_the_right_direction_lowers_the_loss() -> None:
    method = make()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.4, momentum=0.9)
    history = []
    for _ in range(8):
        losses = method(batch(4))["loss"]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        history.append(float(losses.detach().mean()))
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize("recipe", ["stfpm_mvtec", "stfpm_notebook"])
def test_the_recipes_build_and_know_their_layers(recipe: str) -> None:
    run = configuration.load(recipe, ["method.teacher.weights=random"])
    method = build_method(run)
    assert isinstance(method, Stfpm)
    assert sum(p.numel() for p in method.student.parameters() if p.requires_grad) == 2_782_784


def test_another_seed_is_another_student_beside_the_same_pretrained_teacher(
    shared_data: Path,
) -> None:
    file = shared_data / "weights/resnet18_imagenet_layer1-3.safetensors"
    teacher = TeacherConfig("resnet18.tv_in1k", str(file), [1, 2, 3])
    one, other = (Stfpm(StfpmConfig(teacher=teacher), seed=seed) for seed in (0, 1))
    assert weights_hash(one.teacher) == weights_hash(other.teacher)
    assert weights_hash(one.student) != weights_hash(other.student)
