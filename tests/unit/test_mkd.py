"""Multiresolution knowledge distillation as trainer and scorer meet it, and what it refuses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kdad_dist import config as configuration
from kdad_dist.config_methods import MkdConfig, MkdTeacherConfig
from kdad_dist.errors import ConfigError
from kdad_dist.methods import build_method
from kdad_dist.methods.mkd import Mkd
from kdad_dist.methods.readout import Readout
from kdad_dist.methods.saliency import Guided
from kdad_dist.models.weights import weights_hash
from kdad_dist.tiling import Tiling
from kdad_dist.types import Batch

HOW = ["gradient", "smoothgrad", "guided"]


def make(
    backbone: str = "test_resnet",
    layers: tuple[int, ...] = (1, 2, 3),
    size: int = 32,
    **options: object,
) -> Mkd:
    torch.set_num_threads(1)
    teacher = MkdTeacherConfig(backbone, "random", list(layers))
    options = {"pool": False, "noise_copies": 3, **options}
    return Mkd(MkdConfig(teacher=teacher, **options), size, seed=0)  # pyright: ignore[reportArgumentType]


def batch(count: int, seed: int = 0) -> Batch:
    image = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    row = torch.arange(count)
    return Batch(image.contiguous(memory_format=torch.channels_last), row, row)


def gradients(method: Mkd, losses: dict[str, Tensor]) -> list[Tensor | None]:
    method.zero_grad()
    losses["loss"].sum().backward()
    return [p.grad for p in method.student.parameters()]


@pytest.mark.parametrize("student", ["small", "equal", "same"])
def test_gradients_reach_every_weight_of_the_student_and_none_of_the_teacher(student: str) -> None:
    method = make(student=student)
    gradients(method, method(batch(4)))
    # timm starts each residual branch at zero, so what lies inside one moves from the second step.
    torch.optim.SGD(method.student.parameters(), lr=0.1).step()
    assert all(g is not None and g.any() for g in gradients(method, method(batch(4))))
    assert all(p.grad is None for p in method.teacher.parameters())
    assert method.student.training and not method.teacher.training


def test_an_empty_batch_gives_no_loss_zero_gradients_and_no_map() -> None:
    method = make()
    losses = method(batch(0))
    assert {k: tuple(v.shape) for k, v in losses.items()} == {
        "loss": (0,),
        "value": (0,),
        "direction": (0,),
    }
    assert all(g is not None and not g.any() for g in gradients(method, losses))
    assert method.eval().predict(batch(0).image).anomaly_map.shape == (0, 32, 32)


def test_cached_targets_give_the_same_loss_without_the_teacher() -> None:
    method = make(cache_teacher=True)
    assert method.caches_targets
    here = batch(3)
    expected = method(here)["loss"]
    targets = method.targets(here.image)
    assert not any(t.requires_grad for t in targets)
    method.teacher.network = torch.nn.Identity()
    assert torch.equal(method(Batch(here.image, here.row, here.seed, targets))["loss"], expected)


@pytest.mark.parametrize("how", HOW)
def test_maps_leave_no_trace_and_change_no_score(how: str) -> None:
    method = make(localise=how).requires_grad_(False).eval()
    before = weights_hash(method)
    readout = Readout(method, configuration.ScoreConfig(smooth_sigma=1), Tiling(32, 32))
    found = readout(batch(4).image)
    assert found.anomaly_map.shape == (4, 32, 32)
    assert found.anomaly_map.min() >= 0 and found.anomaly_map.amax((1, 2)).min() > 0
    assert not found.pred_score.requires_grad and not found.anomaly_map.requires_grad
    assert all(p.grad is None for p in method.parameters())
    assert weights_hash(method) == before
    assert not [m for m in method.modules() if m._forward_hooks or m._backward_hooks]
    plain = Readout(make(localise="none").eval(), configuration.ScoreConfig(), Tiling(32, 32))(
        batch(4).image
    )
    assert plain.anomaly_map is None
    assert torch.equal(plain.pred_score, found.pred_score)


@pytest.mark.parametrize("how", HOW)
def test_a_map_is_of_its_image_alone(how: str) -> None:
    method = make(localise=how).eval()
    both, first = method.predict(batch(4).image), method.predict(batch(4).image[:1])
    torch.testing.assert_close(first.anomaly_map, both.anomaly_map[:1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first.pred_score, both.pred_score[:1])


def test_the_three_ways_to_localise_differ() -> None:
    maps = [make(localise=how).eval().predict(batch(2).image).anomaly_map for how in HOW]
    assert not maps[0].allclose(maps[1]) and not maps[0].allclose(maps[2])


def test_guiding_one_thread_leaves_the_others_alone() -> None:
    method = make(localise="gradient").eval()
    expected = method.predict(batch(2).image).anomaly_map
    with ThreadPoolExecutor(1) as pool, Guided():
        found = pool.submit(method.predict, batch(2).image).result().anomaly_map
        guided = method.predict(batch(2).image).anomaly_map
    assert torch.equal(found, expected) and not torch.equal(guided, expected)


def test_losses_and_maps_are_float32_under_bf16() -> None:
    method = make().eval()
    exact = method(batch(2))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        losses, found = method(batch(2)), method.predict(batch(2).image)
    assert losses["loss"].dtype == found.anomaly_map.dtype == torch.float32
    torch.testing.assert_close(losses["loss"], exact, rtol=0.05, atol=0)


def test_steps_lower_the_loss() -> None:
    method = make()
    optimizer = torch.optim.Adam(method.student.parameters(), lr=1e-2)
    history = []
    for _ in range(12):
        losses = method(batch(6))["loss"]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        history.append(losses.detach().mean().item())
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backbone": "test_vit", "layers": (0, 1), "size": 160}, "at strides 16, 16"),
        ({"size": 41}, "the teacher's maps are"),
        ({"size": 8, "pool": True, "student": "same"}, "too small"),
        ({"layers": (1, 7)}, "has the layers"),
        (
            {"backbone": "test_vit", "layers": (0, 1), "size": 160, "student": "same"}
            | {"localise": "guided"},
            "no ReLU",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused_with_what_does(
    options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.score_layers=[0]", "score_layers must be of teacher.layers"),
        ("method.localise=gradcam", "localise"),
        ("method.value_weight=0 method.direction_weight=0", "both 0"),
        ("method.student=same method.use_bias=true", "use_bias is of cloners"),
        ("method.lamda=0.5", "not a known key"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configuration.load("mkd_mvtec", override.split())


def test_a_recipe_builds() -> None:
    method = build_method(configuration.load("mkd_mvtec", ["method.teacher.weights=random"]))
    assert isinstance(method, Mkd)
    assert method.config.read == [2, 3, 4]
    assert sum(p.numel() for p in method.student.parameters() if p.requires_grad) == 343_984
