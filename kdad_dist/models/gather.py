"""What the processes of a training know of each other's rows while one step is computed."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_here() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(values: Float[Tensor, " n"]) -> Float[Tensor, "p n"]:
    """The vectors of all processes, by rank."""
    gathered = values.new_empty(processes() * len(values))
    dist.all_gather_into_tensor(gathered, values)
    return gathered.view(-1, len(values))


class Rows(NamedTuple):
    """The rows of all processes, by rank, and which of them are one's own."""

    every: Float[Tensor, "n k"]
    own: slice


def rows_of_all(values: Float[Tensor, "b k"]) -> Rows:
    """The rows that all processes hold of a micro-batch, of which any may have none.

    Collective, forward and backward: a row's gradient is the sum of what all processes made of it.
    Alone, and where only shapes are computed (torch's meta device), they are the own rows.
    """
    if processes() == 1 or values.is_meta:
        return Rows(values, slice(0, len(values)))
    # The host waits for the device here: shares may be unequal, and no process knows another's.
    share = torch.full((1,), len(values), dtype=torch.int64, device=values.device)
    counts: list[int] = gather(share).flatten().tolist()
    first = sum(counts[: rank_here()])
    return Rows(_RowsOfAll.apply(values, counts), slice(first, first + len(values)))


class _RowsOfAll(torch.autograd.Function):
    """Rows of unequal shares, through a gather of as many rows as the largest share has."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        width = values.shape[1]
        padded = values.new_zeros(max(counts), width)
        padded[: len(values)] = values
        parts = gather(padded.flatten()).view(len(counts), -1, width)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None]:
        # Gathered and added in the order of ranks: every process computes the same bits.
        total = gather(gradient.contiguous().flatten()).sum(0).view_as(gradient)
        return total.split(ctx.counts)[rank_here()], None
