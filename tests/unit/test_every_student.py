"""What holds for every student of a teacher's features, whatever the method."""

from collections.abc import Callable

import pytest
import torch

from kdad_dist.methods.base import Method
from kdad_dist.runtime.activations import activations
from kdad_dist.runtime.flops import operations
from kdad_dist.types import Batch
from tests.methods import STUDENTS, batch, gradients, weights_hash

every_student = pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS.keys())
Make = Callable[..., Method]


@every_student
def test_gradients_reach_every_weight_of_the_student_and_none_of_the_teacher(make: Make) -> None:
    method = make()
    gradients(method, method(batch(4)))
    # timm starts each residual branch at zero, so what lies inside one moves from the second step.
    torch.optim.SGD(method.student.parameters(), lr=0.1).step()
    assert all(g is not None and g.any() for g in gradients(method, method(batch(4))))
    assert all(p.grad is None for p in method.teacher.parameters())
    assert operations(method, 32) > 0
    assert activations(method, 2, 32, "no") > 0


@every_student
def test_training_mode_never_reaches_the_teacher(make: Make) -> None:
    method = make()
    before = weights_hash(method.teacher)
    method.train()
    method(batch(2))
    assert method.student.training and not method.teacher.training
    assert weights_hash(method.teacher) == before


@every_student
@pytest.mark.parametrize("bf16", [False, True])
def test_an_empty_batch_gives_no_loss_zero_gradients_and_no_map(make: Make, bf16: bool) -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = method(batch(0))
    assert losses.keys() == method(batch(2)).keys()
    assert {tuple(value.shape) for value in losses.values()} == {(0,)}
    assert all(g is not None and not g.any() for g in gradients(method, losses))
    assert method.eval().predict(batch(0).image).anomaly_map.shape == (0, 32, 32)


@every_student
def test_cached_targets_give_the_same_loss_without_the_teacher(make: Make) -> None:
    method = make(cache_teacher=True).eval()
    assert method.caches_targets
    here = batch(3)
    expected = method(here)["loss"]
    targets = method.targets(here.image)
    assert not any(t.requires_grad for t in targets)
    method.teacher.network = torch.nn.Identity()
    assert torch.equal(method(Batch(here.image, here.row, here.seed, targets))["loss"], expected)


@every_student
def test_losses_and_results_are_of_each_image_alone(make: Make) -> None:
    method = make().eval()
    both, one = batch(2), Batch(batch(2).image[:1], torch.arange(1), torch.arange(1))
    torch.testing.assert_close(method(one)["loss"], method(both)["loss"][:1])
    said, first = method.predict(both.image), method.predict(one.image)
    torch.testing.assert_close(first.anomaly_map, said.anomaly_map[:1], rtol=1e-3, atol=1e-6)


@every_student
def test_losses_and_maps_are_float32_under_bf16_and_near_the_exact_ones(make: Make) -> None:
    method = make().eval()
    exact = method(batch(2))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        losses, found = method(batch(2)), method.predict(batch(2).image)
    assert losses["loss"].dtype == found.anomaly_map.dtype == torch.float32
    torch.testing.assert_close(losses["loss"], exact, rtol=0.05, atol=0)


@every_student
def test_steps_lower_the_loss(make: Make) -> None:
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
