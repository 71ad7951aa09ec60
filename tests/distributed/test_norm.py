"""Batch statistics of several processes are those of one process that holds all the rows."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdad_dist.models.norm import GlobalBatchNorm, convert_batchnorm
from tests.launcher import run_ranks

Outcome = dict[str, Tensor]


def rows_of(rank: int, rows: tuple[int, ...]) -> slice:
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def batch(step: int, rows: int, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Images far from zero mean, and the gradient that comes back for each value."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, 9, 7, generator=g) * torch.arange(1, 7).view(1, 6, 1, 1) + 3
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (
        x.to(dtype).contiguous(memory_format=layout),
        torch.randn(x.shape, generator=g).to(dtype) / rows,
    )


def normalise(
    rows: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Outcome:
    """Two steps over this rank's rows of a batch; with one process, over all of it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = rows_of(rank, rows) if dist.is_initialized() else slice(None)
    layer = convert_batchnorm(nn.BatchNorm2d(6))
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    nn.init.uniform_(layer.weight, generator=torch.Generator().manual_seed(9))
    nn.init.uniform_(layer.bias, generator=torch.Generator().manual_seed(8))
    outcome: Outcome = {}
    for step in range(2):
        x, dy = batch(step, sum(rows), dtype, channels_last)
        x = x[mine].requires_grad_()
        y = layer(x)
        y.backward(dy[mine])
        assert x.grad is not None and x.grad.dtype == y.dtype == x.dtype
        outcome |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    grads = {f"d{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return outcome | grads | {n: b.clone() for n, b in layer.named_buffers()}


def joined(outcomes: list[Outcome]) -> Outcome:
    """Rows put together, gradients of parameters summed, buffers required to be equal."""
    whole: Outcome = {}
    for name in outcomes[0]:
        parts = [outcome[name] for outcome in outcomes]
        if name[0] == "y" or name[:2] == "dx":
            whole[name] = torch.cat(parts)
        elif name[0] == "d":
            whole[name] = torch.stack(parts).sum(0)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs by rank"
            whole[name] = parts[0]
    return whole


@pytest.mark.parametrize("rows", [(3, 3), (5, 2), (7, 0), (2, 0, 4), (1, 1, 1), (0, 0, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_processes_with_unequal_rows_equal_one(rows: tuple[int, ...], channels_last: bool):
    serial = normalise(rows, channels_last=channels_last)
    parallel = joined(run_ranks(normalise, len(rows), rows, torch.float32, channels_last))
    assert serial.keys() == parallel.keys()
    for name, value in serial.items():
        scale = max(1.0, value.abs().max().item())  # sums of hundreds of terms are among them
        torch.testing.assert_close(parallel[name], value, rtol=0, atol=1e-6 * scale, msg=name)


def test_running_statistics_are_kept_in_float32_for_bfloat16_images():
    serial = normalise((4, 3), torch.bfloat16)
    parallel = joined(run_ranks(normalise, 2, (4, 3), torch.bfloat16))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(parallel[name], serial[name], rtol=1e-6, atol=1e-6)
    for name in ("y1", "dx1"):
        assert parallel[name].dtype == torch.bfloat16
        torch.testing.assert_close(parallel[name], serial[name], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(parallel["dweight"], serial["dweight"], rtol=1e-3, atol=1e-3)


def under_autocast() -> list[torch.dtype]:
    net = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(2, 3, 8, 8))
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    return [y.dtype, *(b.dtype for b in net.buffers()), *(p.grad.dtype for p in net.parameters())]  # type: ignore[union-attr]


def test_autocast_changes_the_types_as_it_does_in_one_process():
    assert run_ranks(under_autocast, 2) == [under_autocast()] * 2


def gradient_against_differences() -> bool:
    """Of sum(y * fixed), summed over the ranks, with respect to this rank's rows."""
    rank = dist.get_rank()
    layer = GlobalBatchNorm(2).double()
    fixed = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    x = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + rank))

    def total(values: Tensor) -> Tensor:
        value = (layer(values) * fixed).sum().detach()
        dist.all_reduce(value)
        return value

    leaf = x.clone().requires_grad_()
    (layer(leaf) * fixed).sum().backward()
    assert leaf.grad is not None
    for owner in range(dist.get_world_size()):
        for i in range(x.numel()):
            step = torch.zeros_like(x)
            if rank == owner:
                step.view(-1)[i] = 1e-6
            slope = (total(x + step) - total(x - step)) / 2e-6
            if rank == owner:
                torch.testing.assert_close(leaf.grad.view(-1)[i], slope, rtol=1e-5, atol=1e-7)
    return True


def test_the_gradient_equals_finite_differences_across_processes():
    assert run_ranks(gradient_against_differences, 2) == [True, True]


def too_few(rows: int) -> str:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        convert_batchnorm(nn.BatchNorm1d(3))(torch.randn(rows if dist.get_rank() == 0 else 0, 3))
    return str(caught.value)


@pytest.mark.parametrize("rows", [0, 1])
def test_one_value_per_channel_in_all_processes_together_is_refused_on_each(rows: int):
    assert len(run_ranks(too_few, 2, rows)) == 2


def one_row_each() -> Tensor:
    return convert_batchnorm(nn.BatchNorm1d(3))(torch.full((1, 3), float(dist.get_rank())))


def test_one_row_in_each_of_two_processes_is_enough():
    first, second = run_ranks(one_row_each, 2)
    torch.testing.assert_close(torch.cat([first, second]).mean(0), torch.zeros(3))


def scores_without_meeting() -> Tensor:
    """In eval mode, by rank 0 alone: a collective would wait for the other rank."""
    net = convert_batchnorm(nn.BatchNorm2d(2)).eval()
    return net(torch.ones(1, 2, 2, 2)) if dist.get_rank() == 0 else torch.zeros(0)


def test_eval_mode_talks_to_nobody():
    run_ranks(scores_without_meeting, 2)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 4)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return convert_batchnorm(nn.Sequential(*layers)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    sizes: tuple[int, ...], steps: int, dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights; the rows of a step go to the ranks in turns, so that some get none."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    net = conv_net().to(dtype)
    model: Any = net
    if world > 1:
        model = DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        rows = sizes[step % len(sizes)]
        x = torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(step))
        mine = x.to(dtype)[rank::world]
        # DDP averages over the processes; the loss is a mean over all rows.
        loss = (model(mine) - mine.mean(1, keepdim=True)).square().mean((1, 2, 3)).sum() / rows
        optimizer.zero_grad()
        (loss * world).backward()
        optimizer.step()
        total = loss.detach()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses, net.state_dict()


# In float64 only the arithmetic counts; in float32 its rounding, which every step amplifies, too.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("processes", [2, 3])
def test_twenty_steps_on_several_processes_equal_one_process(
    processes: int, dtype: torch.dtype, tolerance: float
):
    sizes = (8, 5, 1)  # the last leaves a process without a row
    losses, weights = train(sizes, 20, dtype)
    for other_losses, other_weights in run_ranks(train, processes, sizes, 20, dtype):
        assert other_losses == pytest.approx(losses, rel=tolerance, abs=tolerance)
        for name, value in weights.items():
            torch.testing.assert_close(
                other_weights[name], value, rtol=100 * tolerance, atol=10 * tolerance, msg=name
            )
    assert losses[-3] < losses[0]
