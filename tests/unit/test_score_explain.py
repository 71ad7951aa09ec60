"""What several classifiers look at, compared image by image and on average."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdad_dist.metrics.agreement import agreement
from kdad_dist.models.backbone_classifier import Classifier
from kdad_dist.score.explain import Explainer, compared, mean_over, write_explained
from tests.helpers import texture


class Colours(nn.Module):
    """Its last maps are the colours of the image, every fourth pixel."""

    def forward_features(self, image: Tensor) -> Tensor:
        return image[:, :, ::4, ::4]

    def forward_head(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def looking_at(colour: int) -> Classifier:
    """A network for which the amount of a colour speaks for class 0, and nothing for class 1."""
    head = nn.Linear(3, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.weight.data[0, colour] = 1.0
    return Classifier(Colours(), head, (0, 0, 0), (1, 1, 1)).eval()


@pytest.fixture
def explainer() -> Explainer:
    networks = {"student": looking_at(0), "teacher": looking_at(0), "beside": looking_at(2)}
    return Explainer(networks, torch.device("cpu"))


def images(count: int) -> list:
    return [texture(seed, 16, 16) for seed in range(count)]


def test_networks_that_look_at_the_same_agree_and_others_less(explainer: Explainer):
    seen = explainer(images(3), [0, 0, 0])
    for one in seen:
        assert one.told == {"student": 0, "teacher": 0, "beside": 0}
        found = compared(one)
        assert found.keys() == {"gradcam", "gradcam++"}
        for pairs in found.values():
            assert pairs.keys() == {"student_teacher", "student_beside", "teacher_beside"}
            assert pairs["student_teacher"] == pytest.approx((1, 1))
            assert pairs["student_beside"] == pairs["teacher_beside"] != pytest.approx((1, 1))
    expected = agreement(seen[1].maps["student"]["gradcam"], seen[1].maps["beside"]["gradcam"])
    assert compared(seen[1])["gradcam"]["student_beside"] == expected


def test_an_image_does_not_depend_on_its_unit(explainer: Explainer):
    together, alone = explainer(images(3), [0, 0, 0])[1], explainer(images(3)[1:2], [0])[0]
    for name, maps in together.maps.items():
        for kind, drawn in maps.items():
            assert np.allclose(drawn, alone.maps[name][kind], atol=1e-6)


def test_means_are_over_the_images_that_can_be_compared(explainer: Explainer):
    labels = [0, 1, 0]  # nothing speaks for class 1
    rows = [{"agreement": compared(seen)} for seen in explainer(images(3), labels)]
    rows = json.loads(json.dumps(rows))  # as they are read back
    for pairs in mean_over(rows).values():
        assert pairs["student_teacher"] == pytest.approx(
            {"correlation": 1, "overlap": 1, "images": 2, "without": 1}
        )
    nothing = mean_over(rows[1:2])["gradcam"]["teacher_beside"]
    assert nothing == {"correlation": None, "overlap": None, "images": 0, "without": 1}


def test_the_first_image_of_each_class_is_kept_with_all_maps(explainer: Explainer, tmp_path: Path):
    rows = [{"key": f"image{i}", "gt_label": label} for i, label in enumerate([1, 0, 1, 0])]
    loaded = []

    def load(key: str) -> np.ndarray:
        loaded.append(key)
        return images(4)[int(key[-1])]

    write_explained(tmp_path / "explained", ["cat", "dog"], rows, explainer, load)
    entries = json.loads((tmp_path / "explained/explained.json").read_text())
    assert [(entry["key"], entry["class_name"]) for entry in entries] == [
        ("image1", "cat"),
        ("image0", "dog"),
    ]
    assert loaded == ["image1", "image0"]
    named = {entry["image"] for entry in entries}
    named |= {f for entry in entries for maps in entry["maps"].values() for f in maps.values()}
    assert {path.name for path in (tmp_path / "explained").glob("*.png")} == named
    assert len(named) == 2 * (1 + 3 * 2)
