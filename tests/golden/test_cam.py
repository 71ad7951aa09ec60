"""Grad-CAM and Grad-CAM++ on cases worked by hand, and on networks of timm."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from kdad_dist.errors import ConfigError
from kdad_dist.methods.cam import evidence, higher_weights, mean_weights, refuse_flat
from kdad_dist.metrics.agreement import agreement
from kdad_dist.models.backbone_classifier import Classifier


class ByHand(nn.Module):
    """Two feature maps of 2 x 2 that are given, and logits that are worked out on paper.

    logit 0 = A00^2 + 3 B11, so its gradient is 2 A00 at one place of A, and 3 at one of B.
    """

    def features(self, image: Tensor) -> Tensor:
        return image[:, :2, ::2, ::2]

    def classify(self, maps: Tensor) -> Tensor:
        a, b = maps.unbind(1)
        return torch.stack([a[:, 0, 0] ** 2 + 3 * b[:, 1, 1], -a.sum((1, 2))], dim=1)


class OfTimm:
    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    def features(self, image: Tensor) -> Tensor:
        return self.network.forward_features(image)  # type: ignore

    def classify(self, features: Tensor) -> Tensor:
        return self.network.forward_head(features)  # type: ignore


A, B = [[2.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 2.0]]
"""The gradients of logit 0: [[4, 0], [0, 0]] and [[0, 0], [0, 3]]."""


def image() -> Tensor:
    maps = torch.tensor([[A, B, A]])
    return maps.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_the_weights_are_those_worked_by_hand():
    maps = torch.tensor([[A, B]])
    gradient = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]])
    assert mean_weights(maps, gradient).tolist() == [[1.0, 0.75]]
    # alpha = 1 / (2 + sum(A) g): 1 / (2 + 4 * 4) and 1 / (2 + 3 * 3), times g.
    expected = [[4 / 18, 3 / 11]]
    assert higher_weights(maps, gradient).tolist() == [pytest.approx(expected[0])]


def test_alpha_is_that_of_the_paper():
    random = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, 4, generator=random).double()
    g = torch.randn(2, 3, 4, 4, generator=random).double()
    alpha = g**2 / (2 * g**2 + (maps.sum((2, 3), keepdim=True)) * g**3)
    assert torch.allclose(higher_weights(maps, g), (alpha * g.relu()).sum((2, 3)))


def test_the_maps_are_those_worked_by_hand():
    said = evidence(ByHand(), image(), torch.tensor([0]))
    assert said.logits.tolist() == [[10.0, -4.0]]
    found = said.maps
    # 1 A + 0.75 B, highest where B is 2.
    by_hand = {"gradcam": [[2.0, 1.0], [0.75, 2.5]]}
    by_hand["gradcam++"] = [[4 / 9, 2 / 9], [3 / 11, 2 / 9 + 6 / 11]]
    for kind, values in by_hand.items():
        corners = found[kind][0, ::3, ::3]  # bilinear: the corners of the image are the maps'
        assert torch.allclose(corners, torch.tensor(values) / max(values[1])), kind


def test_evidence_against_a_class_is_not_drawn():
    found = evidence(ByHand(), image(), torch.tensor([1])).maps
    assert all((values == 0).all() for values in found.values())


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_batched_maps_are_those_of_each_image_and_the_network_is_left_as_it_was(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=5)
        pictures = torch.rand(3, 3, 64, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    label = torch.tensor([0, 4, 2])
    together = evidence(OfTimm(network), pictures, label).maps
    for kind, values in together.items():
        assert values.shape == (3, 64, 64) and not values.requires_grad
        assert values.min() >= 0 and values.max() <= 1
        alone = evidence(OfTimm(network), pictures[1:2], label[1:2]).maps[kind]
        assert np.allclose(values[1:2], alone, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_a_network_without_rows_and_columns_is_refused():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    with pytest.raises(ConfigError, match=r"features of the teacher have the shape \(1, 5, 192\)"):
        refuse_flat("teacher", OfTimm(network), torch.rand(1, 3, 32, 32))
    refuse_flat("student", ByHand(), image())


def test_a_network_with_a_single_position_is_warned_of_and_its_maps_point_nowhere(caplog):
    network = OfTimm(timm.create_model("resnet10t", num_classes=5))
    pictures = torch.rand(2, 3, 32, 32)
    refuse_flat("student", network, pictures)
    [said] = caplog.messages
    assert "of the student are 1 x 1 in images of 32 pixels" in said
    for drawn in evidence(network, pictures, torch.tensor([0, 1])).maps.values():
        assert [agreement(one.numpy(), one.numpy()) for one in drawn] == [None, None]


def test_channels_that_come_last_are_put_in_front():
    class Last(nn.Module):
        output_fmt = "NHWC"

        def forward_features(self, image: Tensor) -> Tensor:
            return image[:, :2, ::2, ::2].permute(0, 2, 3, 1)

        def forward_head(self, maps: Tensor) -> Tensor:
            return maps.mean((1, 2))

    network = Classifier(Last(), nn.Linear(2, 3), (0, 0, 0), (1, 1, 1))
    maps = network.features(image())
    assert maps.tolist() == [[A, B]]
    assert torch.allclose(network.classify(maps), network.head(maps.mean((2, 3))))
