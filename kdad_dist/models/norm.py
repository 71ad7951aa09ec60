"""BatchNorm whose training statistics are those of the global micro-batch, on gloo and NCCL alike.

torch's SyncBatchNorm refuses a CPU. Here the native kernels do the heavy part, and the processes
exchange two small vectors per layer: (mean, variance, count) on the way forward, two sums of the
gradient on the way back, gathered and added in the order of ranks, so that every process computes
the same bits. In one process, and in eval mode, it is torch's own batch_norm and nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from kdad_dist.errors import ConfigError, TrainingError
from kdad_dist.models.gather import gather, processes

TOO_FEW = "Expected more than 1 value per channel when training"
"""How torch begins to say it."""
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def convert_batchnorm(module: nn.Module) -> nn.Module:
    """The module itself, its BatchNorms made global in place; names and values stay as they are.

    Layers that normalise, drop and activate in one (timm's BatchNormAct2d) are among them.

    Raises:
        ConfigError: a layer is a BatchNorm of a kind whose forward is not known here.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        parts = [part for part, _ in layer.named_children()]
        if type(layer) not in _PLAIN and parts not in ([], ["drop", "act"]):
            raise ConfigError(
                f"layer {name} is a {type(layer).__name__}, a BatchNorm whose statistics cannot be"
                " shared between processes",
                "choose a backbone with plain BatchNorm, or without it",
            )
        layer.__class__ = GlobalBatchNorm
    return module


@contextmanager
def several_values() -> Iterator[None]:
    """Names the settings where a BatchNorm, torch's own or the one here, finds a single value.

    Raises:
        TrainingError: one image, of which a layer is left with 1x1.
    """
    try:
        yield
    except ValueError as error:
        if TOO_FEW not in str(error):
            raise
        raise TrainingError(
            "a step, or a part of it, has a single image, of which a BatchNorm of the student sees "
            "1x1: there is no variance to divide by",
            "choose train.batch_size (and train.micro_batch_size) so that no part of an epoch is "
            "one image, or a larger data.image_size",
        ) from error


class GlobalBatchNorm(_BatchNorm):
    """Normalises by the rows of all processes together, of which any may have none.

    While training on several processes, all of them run its forward, and its backward, in the same
    order. The gradients of weight and bias are sums over the local rows, as DDP expects them.
    """

    def forward(self, input: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """Raises ValueError where the processes have no two values per channel between them."""
        if self.training and processes() > 1:
            output = self._normalize_globally(input)
        else:
            output = super().forward(input)
        for part in self.children():  # drop and activation, where there are any
            output = part(output)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    @torch.compiler.disable()  # a graph break at every layer, but a sound one
    def _normalize_globally(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        mean, var, count = _global_statistics(x.detach())
        # Who holds several values knows the global count to be larger than one, and need not wait
        # for the device to tell.
        if x.numel() <= x.shape[1] and count.item() <= 1:
            raise ValueError(
                f"{TOO_FEW}, got input size {x.shape} and no more in the other processes"
            )
        if self.track_running_stats:
            self._track(mean, var * (count / (count - 1)).to(var.dtype))
        return _Normalize.apply(x, self.weight, self.bias, mean, var, count, self.eps)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # an average over all batches
            momentum = 1.0 / self.num_batches_tracked.item()
        self.running_mean.mul_(1 - momentum).add_(mean.to(self.running_mean.dtype), alpha=momentum)
        self.running_var.mul_(1 - momentum).add_(
            unbiased_var.to(self.running_var.dtype), alpha=momentum
        )


class _Normalize(torch.autograd.Function):
    """weight * (x - mean) / sqrt(var + eps) + bias, with mean and var functions of all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return _affine(x, weight, bias, mean, var, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Equation of Ioffe and Szegedy 2015, section 3, with the sums over all processes.

        dx = weight / std * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)
        """
        x, weight, mean, var, count = ctx.saved_tensors
        inverse_std = (var + ctx.eps).rsqrt()
        dy = _laid_out_like(dy, x)
        by_weight, by_bias = _gradient_sums(dy, x, mean, inverse_std, ctx.eps)
        dx = None
        if ctx.needs_input_grad[0]:
            means = gather(torch.cat([by_weight, by_bias]).double()).sum(0) / count
            mean_dy_xhat, mean_dy = means.to(mean.dtype).chunk(2)
            scale = inverse_std if weight is None else inverse_std * weight
            dx = _affine(x, -scale * mean_dy_xhat, -scale * mean_dy, mean, var, ctx.eps)
            dx += _affine(dy, scale, None, torch.zeros_like(mean), torch.ones_like(var), 0.0)
        return (
            dx,
            by_weight if ctx.needs_input_grad[1] else None,
            by_bias if ctx.needs_input_grad[2] else None,
            *(None,) * 4,
        )


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (c), at least float32, and the count () of values, float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    mean = torch.zeros(channels, dtype=dtype, device=x.device)
    var = torch.zeros_like(mean)
    if len(x):  # the kernel for running statistics yields those of the batch, many times faster
        mean, var = torch.ops.aten.batch_norm_update_stats(x, mean, var, 0.0)  # than var_mean
    count = torch.full_like(mean[:1], x.numel() // channels, dtype=torch.float64)
    # Chan, Golub and LeVeque 1979, for all processes at once, in float64.
    every = gather(torch.cat([mean.double(), var.double(), count]))
    means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
    total = counts.sum()
    mean64 = (means * counts).sum(0) / total
    var64 = ((variances + (means - mean64).square()) * counts).sum(0) / total
    return mean64.to(dtype), var64.to(dtype), total


def _gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums (c) over the local rows of dy * xhat and of dy: the gradients of weight and bias."""
    if not len(x):
        return torch.zeros_like(mean), torch.zeros_like(mean)
    ones = torch.ones_like(mean)
    _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
        dy, x, ones, mean, ones, mean, inverse_std, True, eps, [False, True, True]
    )
    return by_weight, by_bias


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias, computed in the precision of `mean`."""
    if not len(x):
        return torch.empty_like(x)
    weight = None if weight is None else weight.to(mean.dtype)
    bias = None if bias is None else bias.to(mean.dtype)
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)


def _laid_out_like(dy: Tensor, x: Tensor) -> Tensor:
    """The native kernels are slow where the memory formats of their arguments differ."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return dy.contiguous(memory_format=torch.channels_last)
    return dy.contiguous()
