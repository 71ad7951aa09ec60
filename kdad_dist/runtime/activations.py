"""How much memory one forward and backward pass takes beside the weights, without computing it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdad_dist.methods.base import Method
from kdad_dist.runtime.flops import without_data
from kdad_dist.types import Batch, Features

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that live within it, each storage once.

    Args:
        known: tensors whose memory is counted elsewhere.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name not in self._held:
            self._held[name] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.now -= self._held.pop(name)


def activations(method: Method, images: int, image_size: int, precision: str) -> int:
    """The most bytes that a pass over so many images holds at once beside weights, gradients and
    optimizer: the batch, what the backward pass needs, and what is only passed on.

    Nothing is computed: a copy without data does it, with the operations of a CPU. On a GPU, some
    kernels keep less (attention) or take room to work in (convolutions). Not counted is what
    `train.compile` saves.
    """
    if images == 0:
        return 0
    with FakeTensorMode():
        twin = without_data(method, "cpu").train()
        return pass_peak(twin, images, image_size, precision)


def pass_peak(method: Method, images: int, image_size: int, precision: str) -> int:
    """As `activations`, on the method as it is: really computed, unless its tensors are fake.

    The gradients of weights are dropped as soon as they are done.
    """
    weights = [*method.parameters(), *method.buffers()]
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop)
        for parameter in method.parameters()
        if parameter.requires_grad
    ]
    targets = cached(method, images, image_size, precision)
    with Living(weights) as living, autocast(precision):
        number = torch.zeros(images, dtype=torch.int64)
        batch = Batch(blank(images, image_size), number, number, targets or None, number)
        method(batch)["loss"].sum().backward()
    for hook in hooks:
        hook.remove()
    return living.peak + sum(target.nbytes for target in targets)


def cached(method: Method, images: int, image_size: int, precision: str) -> Features:
    """What a batch holds of a teacher whose output is cached; nothing where it is not."""
    if not method.caches_targets:
        return ()
    with autocast(precision):
        return method.targets(blank(images, image_size))


def blank(images: int, size: int) -> Tensor:
    """Images as loaders give them: (b, 3, s, s) in channels_last memory."""
    return torch.zeros(images, size, size, 3).permute(0, 3, 1, 2)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
