"""STFPM against the equations, in plain loops."""

import math

import pytest
import torch
from torch import Tensor

from kdad_dist.config.methods import StfpmConfig, TeacherConfig
from kdad_dist.methods.stfpm import Stfpm, combine, distance
from kdad_dist.types import Batch

SMALL = TeacherConfig("test_resnet", "random", [1, 2, 3])


def naive_distance(target: Tensor, feature: Tensor) -> Tensor:
    """Of one image's maps (c, h, w): the squared distance of the unit vectors, per position."""
    _, height, width = target.shape
    result = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            t, s = target[:, y, x].double(), feature[:, y, x].double()
            t, s = t / math.sqrt((t * t).sum()), s / math.sqrt((s * s).sum())
            result[y, x] = sum((a - b) ** 2 for a, b in zip(t.tolist(), s.tolist(), strict=True))
    return result


def naive_bilinear(values: Tensor, height: int, width: int) -> Tensor:
    """Enlarges one map (h, w), with pixel centres at half-integers and edges repeated."""
    rows, columns = values.shape
    result = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = values[top, left] * (1 - u + left) + values[top, right] * (u - left)
            lower = values[bottom, left] * (1 - u + left) + values[bottom, right] * (u - left)
            result[y, x] = upper * (1 - v + top) + lower * (v - top)
    return result


@pytest.fixture
def method() -> Stfpm:
    torch.set_num_threads(1)
    return Stfpm(StfpmConfig(teacher=SMALL, normalize=False), seed=0)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def maps_of(method: Stfpm, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    with torch.no_grad():
        return list(method.teacher(images)), list(method.student(images))


def test_the_loss_is_the_papers(method: Stfpm, images: Tensor) -> None:
    targets, features = maps_of(method, images)
    losses = method(Batch(images, torch.arange(2), torch.arange(2)))
    for i in range(2):
        terms = [naive_distance(t[i], s[i]).mean() for t, s in zip(targets, features, strict=True)]
        for layer, term in zip((1, 2, 3), terms, strict=True):
            torch.testing.assert_close(losses[f"layer{layer}"][i].detach(), term)
        torch.testing.assert_close(losses["loss"][i].detach(), torch.stack(terms).sum())


def test_the_notebooks_loss_is_the_papers_times_batch_over_six(
    method: Stfpm, images: Tensor
) -> None:
    """(1/3) sum_l sum_{b,c,h,w} 0.5 (t^ - s^)^2 / (h w), not divided by the batch."""
    targets, features = maps_of(method, images)
    notebook = sum(
        0.5 * naive_distance(t[i], s[i]).sum() / t[i, 0].numel()
        for t, s in zip(targets, features, strict=True)
        for i in range(2)
    )
    ours = method(Batch(images, torch.arange(2), torch.arange(2)))["loss"].mean()
    torch.testing.assert_close(notebook / 3, ours.detach() * 2 / 6)


def test_the_official_map_is_the_product_at_the_first_layers_size(
    method: Stfpm, images: Tensor
) -> None:
    method.eval()
    maps = method.predict(images).anomaly_map
    targets, features = maps_of(method, images)
    for i in range(2):
        layers = [naive_distance(t[i], s[i]) for t, s in zip(targets, features, strict=True)]
        product = layers[0]
        for layer in layers[1:]:
            product = product * naive_bilinear(layer, *layers[0].shape)
        torch.testing.assert_close(maps[i].detach(), naive_bilinear(product, 64, 64))


@pytest.mark.parametrize("how", ["sum", "sum_per_area"])
def test_the_sums_are_of_enlarged_maps_and_the_notebooks_favours_the_deepest_layer(
    how: str, images: Tensor
) -> None:
    method = Stfpm(StfpmConfig(teacher=SMALL, normalize=False, combine=how), seed=0).eval()
    maps = method.predict(images).anomaly_map
    targets, features = maps_of(method, images)
    expected = torch.zeros(64, 64)
    for t, s in zip(targets, features, strict=True):
        weight = 0.5 / t[0, 0].numel() if how == "sum_per_area" else 1
        expected += weight * naive_bilinear(naive_distance(t[0], s[0]), 64, 64)
    torch.testing.assert_close(maps[0].detach(), expected)


def test_a_resnet18_student_has_the_published_number_of_parameters() -> None:
    teacher = TeacherConfig("resnet18", "random", [1, 2, 3])
    method = Stfpm(StfpmConfig(teacher=teacher), seed=0)
    for network in (method.student, method.teacher):
        assert sum(p.numel() for p in network.parameters()) == 2_782_784


def test_the_distance_keeps_its_digits_where_student_and_teacher_almost_agree() -> None:
    target = torch.rand(1, 64, 4, 4, generator=torch.Generator().manual_seed(1))
    feature = target * 3 + 1e-4 * torch.rand(
        1, 64, 4, 4, generator=torch.Generator().manual_seed(2)
    )
    exact = naive_distance(target[0], feature[0])
    assert exact.max() < 1e-7
    torch.testing.assert_close(distance(target, feature)[0], exact, rtol=1e-2, atol=0)


def test_one_layer_is_its_own_product_and_its_own_sum() -> None:
    values = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(3))
    product = combine([values], "product", 32, 32)
    torch.testing.assert_close(product, combine([values], "sum", 32, 32))
