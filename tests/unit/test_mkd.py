"""Multiresolution knowledge distillation as trainer and scorer meet it, and what it refuses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kdad_dist.config.changes import changed_keys
from kdad_dist.config.load import load, plain
from kdad_dist.config.run import ScoreConfig
from kdad_dist.errors import ConfigError
from kdad_dist.methods import build_method
from kdad_dist.methods.mkd import Mkd
from kdad_dist.methods.readout import Readout
from kdad_dist.methods.saliency import Guided
from kdad_dist.score.scoring import plan
from kdad_dist.tiling import Tiling
from tests.methods import batch, make_mkd, weights_hash

HOW = ["gradient", "smoothgrad", "guided"]


@pytest.mark.parametrize("how", HOW)
def test_maps_leave_no_trace_and_change_no_score(how: str) -> None:
    method = make_mkd(localise=how).requires_grad_(False).eval()
    before = weights_hash(method)
    readout = Readout(method, ScoreConfig(smooth_sigma=1), Tiling(32, 32))
    found = readout(batch(4).image)
    assert found.anomaly_map.shape == (4, 32, 32)
    assert found.anomaly_map.min() >= 0 and found.anomaly_map.amax((1, 2)).min() > 0
    assert not found.pred_score.requires_grad and not found.anomaly_map.requires_grad
    assert all(p.grad is None for p in method.parameters())
    assert weights_hash(method) == before
    assert not [m for m in method.modules() if m._forward_hooks or m._backward_hooks]
    plain = Readout(make_mkd(localise="none").eval(), ScoreConfig(), Tiling(32, 32))(batch(4).image)
    assert plain.anomaly_map is None
    assert torch.equal(plain.pred_score, found.pred_score)


@pytest.mark.parametrize("how", HOW)
def test_a_map_is_of_its_image_alone(how: str) -> None:
    method = make_mkd(localise=how).eval()
    both, first = method.predict(batch(4).image), method.predict(batch(4).image[:1])
    torch.testing.assert_close(first.anomaly_map, both.anomaly_map[:1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first.pred_score, both.pred_score[:1])


def test_the_three_ways_to_localise_differ() -> None:
    maps = [make_mkd(localise=how).eval().predict(batch(2).image).anomaly_map for how in HOW]
    assert not maps[0].allclose(maps[1]) and not maps[0].allclose(maps[2])


def test_guiding_one_thread_leaves_the_others_alone() -> None:
    method = make_mkd(localise="gradient").eval()
    expected = method.predict(batch(2).image).anomaly_map
    with ThreadPoolExecutor(1) as pool, Guided():
        found = pool.submit(method.predict, batch(2).image).result().anomaly_map
        guided = method.predict(batch(2).image).anomaly_map
    assert torch.equal(found, expected) and not torch.equal(guided, expected)


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
        (
            {"backbone": "mobilenetv3_small_050", "layers": (1, 2), "size": 64, "student": "same"}
            | {"localise": "guided"},
            "Hardswish beside ReLU",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused_with_what_does(
    options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_mkd(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.score_layers=[0]", "score_layers must be of teacher.layers"),
        ("method.localise=gradcam", "localise"),
        ("method.value_weight=0 method.direction_weight=0", "both 0"),
        ("method.student=same method.use_bias=true", "use_bias is of cloners"),
        ("method.lamda=0.5", "not a known key"),
        ("method.balance=true method.value_weight=0.01", "set both to 1"),
        ("method.balance=true method.value_weight=0", "set both to 1"),
        ("method.localise=none method.stretch_maps=true", "localise=none makes none"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load("mkd_mvtec", override.split())


def test_maps_that_nobody_makes_are_not_kept() -> None:
    config = load("mkd_mvtec", ["method.localise=none", "score.save_maps=png"])
    with pytest.raises(ConfigError, match="method.localise=none makes no maps"):
        plan(config)


@pytest.mark.parametrize(
    ("words", "pools"),
    [
        ([], True),
        (["method.teacher.backbone=resnet18.tv_in1k"], False),
        (["method.teacher.backbone=resnet18.tv_in1k", "method.pool=true"], True),
        (["method.pool=false"], False),
    ],
)
def test_the_maps_of_a_vgg_are_pooled_and_the_run_says_so(words: list[str], pools: bool) -> None:
    config = load("mkd_mvtec", words)
    assert plain(config)["method"]["pool"] is pools
    assert (
        changed_keys(config, load("mkd_mvtec", [*words, f"method.pool={str(pools).lower()}"])) == []
    )


def test_a_recipe_builds() -> None:
    method = build_method(load("mkd_mvtec", ["method.teacher.weights=random"]))
    assert isinstance(method, Mkd)
    assert method.config.read == [2, 3, 4]
    assert sum(p.numel() for p in method.student.parameters() if p.requires_grad) == 343_984
