"""Multiresolution knowledge distillation against its equations, counts and cases worked by hand."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_opening, grey_opening
from torch import Tensor, nn

from kdad_dist.config.methods import MkdConfig, MkdTeacherConfig
from kdad_dist.draws import normal
from kdad_dist.methods import saliency
from kdad_dist.methods.feature_loss import direction
from kdad_dist.methods.mkd import Mkd
from kdad_dist.methods.readout import opened
from kdad_dist.methods.saliency import (
    Guided,
    input_gradient,
    magnitude,
    smooth_gradient,
    stretched,
)
from kdad_dist.types import Batch

TINY = MkdTeacherConfig("test_resnet", "random", [1, 2, 3])
CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)


def make(**options: object) -> Mkd:
    torch.set_num_threads(1)
    options = {"teacher": TINY, "pool": False, "normalize": False, **options}
    return Mkd(MkdConfig(**options), 32, seed=0).eval()  # pyright: ignore[reportArgumentType]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_terms(target: Tensor, feature: Tensor) -> tuple[float, float]:
    """Value and direction of one image's maps of one layer, in plain sums."""
    t, s = (m.detach().double().flatten().tolist() for m in (target, feature))
    pairs = list(zip(t, s, strict=True))
    value = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    lengths = [sum(a * a for a in v) ** 0.5 for v in (t, s)]
    return value, 1 - sum(a * b for a, b in pairs) / (lengths[0] * lengths[1])


@pytest.fixture(scope="module")
def vgg() -> dict[str, Mkd]:
    """Of those that are only counted, no weight is drawn."""
    teacher = MkdTeacherConfig(weights="random")
    methods = {"small": Mkd(MkdConfig(teacher=teacher), 128, seed=0)}
    with torch.device("meta"):
        for name, options in (("biases", {"use_bias": True}), ("equal", {"student": "equal"})):
            methods[name] = Mkd(MkdConfig(teacher=teacher, **options), 128, seed=0)
    return methods


def test_the_cloners_of_a_vgg16_have_the_published_layers_and_parameters(
    vgg: dict[str, Mkd],
) -> None:
    count = {name: sum(p.numel() for p in m.student.parameters()) for name, m in vgg.items()}
    assert count == {"small": 343_984, "biases": 345_536, "equal": 14_715_968}
    assert sum(p.numel() for p in vgg["small"].teacher.parameters()) == 14_714_688
    layers = [
        "M" if isinstance(layer, nn.MaxPool2d) else layer.out_channels
        for layer in vgg["small"].student.modules()
        if isinstance(layer, nn.MaxPool2d | nn.Conv2d)
    ]
    first = [16, 16, "M", 16, 128, "M"]
    assert layers == first + [16, 16, 256, "M"] + [16, 16, 512, "M"] * 2
    norms = [m for m in vgg["small"].student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8  # after all but the last convolution of each stage


def test_the_critical_layers_of_a_vgg16_are_its_last_four_pools(vgg: dict[str, Mkd]) -> None:
    twin = copy.deepcopy(vgg["small"]).to("meta")
    image = torch.zeros(2, 3, 128, 128, device="meta")
    expected = [(2, 128, 32, 32), (2, 256, 16, 16), (2, 512, 8, 8), (2, 512, 4, 4)]
    assert [tuple(m.shape) for m in twin._teacher_maps(image)] == expected
    assert [tuple(m.shape) for m in twin._student_maps(image)] == expected
    # Against the layers of the classifier itself: the pools are its layers 9, 16, 23 and 30.
    method, image = vgg["small"], torch.rand(1, 3, 32, 32)
    convolutions = iter(m for m in method.teacher.modules() if isinstance(m, nn.Conv2d))
    pools, maps = [], image
    for width in (2, 2, 3, 3, 3):
        for _ in range(width):
            maps = next(convolutions)(maps).relu()
        maps = F.max_pool2d(maps, 2)
        pools.append(maps)
    for expected_map, found in zip(pools[1:], method._teacher_maps(image), strict=True):
        torch.testing.assert_close(found, expected_map)


@pytest.mark.parametrize(("value", "direction"), [(0.01, 1.0), (1.0, 0.3), (0.0, 1.0)])
def test_loss_and_score_are_the_plain_formulas(
    value: float, direction: float, images: Tensor
) -> None:
    method = make(value_weight=value, direction_weight=direction)
    losses = method(Batch(images, torch.arange(2), torch.arange(2)))
    score = method.predict(images).pred_score
    targets, features = method._teacher_maps(images), method._student_maps(images)
    for i in range(2):
        layers = [plain_terms(t[i], s[i]) for t, s in zip(targets, features, strict=True)]
        assert losses["value"][i].item() == pytest.approx(sum(v for v, _ in layers), rel=1e-5)
        assert losses["direction"][i].item() == pytest.approx(sum(d for _, d in layers), rel=1e-5)
        weighted = [value * v + direction * d for v, d in layers]
        assert losses["loss"][i].item() == pytest.approx(sum(weighted), rel=1e-5)
        assert score[i].item() == pytest.approx(sum(weighted[1:]), rel=1e-5)  # not the shallowest


def test_the_papers_lambda_makes_both_terms_equal_at_the_start(images: Tensor) -> None:
    method = make(balance=True, value_weight=1.0)
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    method.prepare(images)
    method.train()
    losses = method(Batch(images, torch.arange(2), torch.arange(2)))
    found = (losses["loss"] - losses["value"]).sum()
    torch.testing.assert_close(found, losses["value"].sum())
    method = make(balance=True, value_weight=1.0)
    method.prepare(images)
    changed = [k for k, v in method.student.state_dict().items() if not v.equal(before[k])]
    assert changed == ["direction_balance"]


def test_the_gradient_map_is_autograds_through_both_networks(images: Tensor) -> None:
    method = make(score_layers=[2, 3])
    x = images.clone().requires_grad_()
    targets, features = method._teacher_maps(x), method._student_maps(x)
    score = x.new_zeros(())
    for t, s in list(zip(targets, features, strict=True))[1:]:
        score = score + (0.01 * (t - s).square().mean((1, 2, 3))).sum()
        score = score + (1 - F.cosine_similarity(t.flatten(1), s.flatten(1))).sum()
    score.backward()
    expected = x.grad.abs().sum(1)
    found = method.predict(images).anomaly_map
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2 * 32 * 32, 4 * 32 * 32, saliency.CPU_PIXELS])
def test_smoothgrad_is_the_mean_gradient_at_noisy_images(
    at_once: int, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sum x^3 / 3, whose gradient is x^2; however many copies are taken at a time."""
    monkeypatch.setattr(saliency, "CPU_PIXELS", at_once)
    found = smooth_gradient(lambda x: (x**3 / 3).sum((1, 2, 3)), images, 3, 0.1, seed=5)
    seed = torch.tensor([5])
    noise = [normal(seed, 3 * 32 * 32, stream=i).view(3, 32, 32) for i in range(3)]
    expected = sum((images + 0.1 * n) ** 2 for n in noise) / 3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_maps_of_smoothgrad_are_those_of_one_image_and_one_copy_at_a_time(images: Tensor) -> None:
    method = make(localise="smoothgrad", noise_copies=3)
    expected = []
    for image in images:
        gradients = []
        for number in range(3):
            noise = normal(torch.tensor([0]), 3 * 32 * 32, stream=number).view(3, 32, 32)
            gradients.append(input_gradient(method.score, (image + 0.05 * noise)[None])[0])
        expected.append(magnitude(sum(gradients) / 3))
    found = method.predict(images).anomaly_map
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)


def test_noise_is_normal_and_depends_on_seed_and_stream_alone() -> None:
    values = normal(torch.tensor([1, 2]), 50_000)
    assert values.isfinite().all()
    torch.testing.assert_close(values.mean(1), torch.zeros(2), rtol=0, atol=0.02)
    torch.testing.assert_close(values.std(1), torch.ones(2), rtol=0, atol=0.02)
    assert (values.abs() < 1).float().mean() == pytest.approx(0.6827, abs=0.01)
    assert normal(torch.tensor([2]), 50_000).equal(values[1:])
    assert not normal(torch.tensor([2]), 50_000, stream=1).equal(values[1:])


@pytest.mark.parametrize(
    "relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, Tensor.relu_]
)
def test_guided_backpropagation_by_hand(relu: Callable[[Tensor], Tensor]) -> None:
    """y = relu(2 x) . (1, -1, 1) at x = (1, 1, -1): the second gradient is negative, the third
    input was.
    """
    weights = torch.tensor([1.0, -1.0, 1.0])

    def score(x: Tensor) -> Tensor:
        return relu(2 * x) @ weights

    def guided(x: Tensor) -> Tensor:
        with Guided():
            return score(x)

    image = torch.tensor([[1.0, 1.0, -1.0]])
    gradient, value = input_gradient(score, image)
    assert gradient.tolist() == [[2, -2, 0]] and value.item() == 0
    gradient, value = input_gradient(guided, image)
    assert gradient.tolist() == [[2, 0, 0]] and value.item() == 0


def test_a_map_adds_the_colours_and_is_stretched_by_its_own_99th_percentile() -> None:
    gradient = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.5]], [[0.0, 0.0]]]])
    assert magnitude(gradient).tolist() == [[[4, 2.5]]]
    maps = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1)) * 7 + 2
    for one, found in zip(maps, stretched(maps), strict=True):
        high = np.quantile(one.numpy(), 0.99)
        expected = np.clip((one.numpy() - one.min().item()) / (high - one.min().item()), 0, 1)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert not stretched(torch.full((1, 4, 4), 0.5)).any()


def test_the_opening_is_scipys_with_a_cross_and_that_of_every_threshold() -> None:
    maps = torch.rand(2, 17, 23, generator=torch.Generator().manual_seed(2))
    for one, found in zip(maps.numpy(), opened(maps).numpy(), strict=True):
        inner = (slice(2, -2), slice(2, -2))  # scipy mirrors at the borders
        np.testing.assert_array_equal(found[inner], grey_opening(one, footprint=CROSS)[inner])
        for limit in (0.1, 0.3):
            binary = binary_opening(one > limit, CROSS)
            np.testing.assert_array_equal((found > limit)[inner], binary[inner])


def test_a_vector_of_zeros_is_orthogonal_to_all_others() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert direction(rows, other).tolist() == [1, 1, 1]
    assert direction(other, rows).tolist() == (1 - torch.cosine_similarity(other, rows)).tolist()
