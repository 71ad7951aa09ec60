"""STFPM: its maps, its recipes and its seeds; what holds for others too: test_every_student."""

from pathlib import Path

import pytest

from kdad_dist.config.load import load
from kdad_dist.config.methods import StfpmConfig, TeacherConfig
from kdad_dist.methods import build_method
from kdad_dist.methods.stfpm import Stfpm
from tests.methods import batch, make_stfpm, weights_hash


@pytest.mark.parametrize("combine", ["product", "sum", "sum_per_area"])
def test_maps_are_not_negative_and_of_the_images_size(combine: str) -> None:
    maps = make_stfpm(combine=combine).eval().predict(batch(2).image[..., :24]).anomaly_map
    assert maps.shape == (2, 32, 24)
    assert maps.min() >= 0 and maps.max() > 0


@pytest.mark.parametrize("recipe", ["stfpm_mvtec", "stfpm_notebook"])
def test_the_recipes_build_and_know_their_layers(recipe: str) -> None:
    run = load(recipe, ["method.teacher.weights=random"])
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
