"""Relations among the images of a batch do not depend on how its rows are dealt out."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdad_dist.methods.distill_losses import angle_relations, distance_relations
from kdad_dist.models.gather import rows_of_all
from tests.launcher import run_ranks

RELATIONS = {"distance": distance_relations, "angle": angle_relations}


def related(name: str, shares: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The losses of this rank's rows, and the gradient of the sum of all losses for them."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(sum(shares), 4, generator=generator) for _ in range(2))
    mine = slice(None)
    if dist.is_initialized():
        rank = dist.get_rank()
        mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    own = student[mine].requires_grad_()
    losses = RELATIONS[name](rows_of_all(own), rows_of_all(teacher[mine]))
    losses.sum().backward()
    assert own.grad is not None
    return losses.detach(), own.grad


@pytest.mark.parametrize("shares", [(4, 3), (5, 0, 2)])
def test_losses_and_gradients_of_several_processes_are_those_of_one(shares):
    for name in RELATIONS:
        losses, gradient = related(name, shares)
        parts = run_ranks(related, len(shares), name, shares)
        assert torch.allclose(torch.cat([part[0] for part in parts]), losses, atol=1e-6)
        assert torch.allclose(torch.cat([part[1] for part in parts]), gradient, atol=1e-6)
