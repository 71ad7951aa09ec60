"""What the recipes would gain from 8, 64 and 1024 GPUs, on paper: the table of docs/cluster.md.

    python benchmarks/projection.py

Nothing here was run on a GPU. Counted, from the recipes themselves: arithmetic, operator calls and
gradient of a step, the synchronised norms of a student, memory, the rows of each process. Assumed:
the constants below. A step takes its arithmetic or the launching of its operators, whichever takes
longer, and then the exchange of gradients, of which nothing is hidden behind the backward pass.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from kdad_dist.config.load import load
from kdad_dist.config.run import RunConfig
from kdad_dist.methods import build_method
from kdad_dist.methods.base import Method
from kdad_dist.runtime.account import checkpoint_bytes, memory, trained_bytes
from kdad_dist.runtime.activations import activations, blank
from kdad_dist.runtime.flops import operations, peak, without_data
from kdad_dist.types import Batch
from kdad_dist.wording import duration, readable

GPU = "NVIDIA A100-SXM4-80GB"
ACHIEVED = 0.3
"""Assumed share of the data sheet's arithmetic."""
CALL = 10e-6
"""Assumed seconds for Python and the driver to launch an operator."""
NODE = 8
INSIDE, BETWEEN = 230e9, 20e9
"""Assumed bytes per second and GPU of an all_reduce: NVLink in a node, a 200 Gbit/s network."""
HOP_INSIDE, HOP_BETWEEN = 5e-6, 15e-6
"""Assumed seconds of a message; an exchange has two for each level of a tree."""
IMAGES = {"stfpm_mvtec": 167, "loramae_mvtec": 175}
"""Four fifths of the 209 (bottle) and 219 (capsule) good training images of MVTec AD. The sizes of
loramae_seed are those of loramae_mvtec; its augmentation runs beside the steps."""
CLASSES, IMAGES_OF_ALL = 15, 2903
"""Of MVTec AD, and four fifths of its 3629 good training images."""
SIZES = (1, 8, 64, 1024)


class Calls(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Recipe:
    config: RunConfig
    method: Method
    flops: float
    """Of an image."""
    calls: int
    """Operators of a pass, forward and backward."""
    gradient: int
    norms: list[int]
    """Channels of the layers whose statistics all processes share, forward and backward."""


def read(name: str) -> Recipe:
    """A recipe with random weights of the same sizes."""
    words = ["method.weights=random", "method.freeze_random=true"]
    if name.startswith("stfpm"):
        words = ["method.teacher.weights=random"]
    config = load(name, words)
    method = build_method(config)
    layers = (module for module in method.student.modules() if isinstance(module, _BatchNorm))
    norms = [layer.num_features for layer in layers]
    size = config.data.image_size
    calls = operator_calls(method, size)
    return Recipe(config, method, operations(method, size), calls, trained_bytes(method), norms)


def operator_calls(method: Method, size: int) -> int:
    twin = without_data(method, "meta").train()
    with torch.device("meta"):
        image, number = blank(2, size), torch.zeros(2, dtype=torch.int64)
    with Calls() as calls:
        twin(Batch(image, number, number))["loss"].sum().backward()
    return calls.number


def messages(gpus: int) -> float:
    """Seconds of the two messages for each level of a tree."""
    levels, above = math.log2(min(gpus, NODE)), math.log2(max(1, gpus // NODE))
    return 2 * (levels * HOP_INSIDE + above * HOP_BETWEEN)


def exchange(size: float, gpus: int) -> float:
    """Seconds of an all_reduce: 2 (n - 1) / n of the bytes cross the slowest link."""
    width = BETWEEN if gpus > NODE else INSIDE
    return 2 * (gpus - 1) / gpus * size / width + messages(gpus)


def gather(size: float, gpus: int) -> float:
    """Seconds of an all_gather of so many bytes of each."""
    width = BETWEEN if gpus > NODE else INSIDE
    return (gpus - 1) * size / width + messages(gpus)


@dataclass(frozen=True)
class Step:
    arithmetic: float
    launching: float
    exchanging: float

    @property
    def total(self) -> float:
        return max(self.arithmetic, self.launching) + self.exchanging

    @property
    def bound(self) -> str:
        """By what a step is bound."""
        parts = {
            "arithmetic": self.arithmetic,
            "launching operators": self.launching,
            "exchange": self.exchanging,
        }
        return max(parts, key=parts.__getitem__)


def step(recipe: Recipe, gpus: int, batch: int) -> Step:
    rate = peak(GPU, recipe.config.train.precision)
    assert rate is not None
    rows = -(-batch // gpus)
    # In float64, mean and variance of each channel and their count; twice, for the backward pass.
    norms = sum(2 * gather(8 * (2 * channels + 1), gpus) for channels in recipe.norms)
    return Step(
        rows * recipe.flops / (rate * ACHIEVED),
        recipe.calls * CALL,
        exchange(recipe.gradient, gpus) + norms,
    )


def table(name: str, images: int, batch_of_one: int | None = None) -> None:
    """Prints a row for each number of GPUs.

    Args:
        batch_of_one: images of each GPU and step, so that the global batch grows with them; None:
            the recipe's global batch.
    """
    recipe = read(name)
    train = recipe.config.train
    alone = step(recipe, 1, batch_of_one or train.batch_size).total
    for gpus in SIZES:
        batch = min(images, batch_of_one * gpus) if batch_of_one else min(train.batch_size, images)
        found, rows = step(recipe, gpus, batch), -(-batch // gpus)
        steps = (train.epochs or 0) * -(-images // batch)
        gain = batch / found.total / ((batch_of_one or batch) / alone)
        size = recipe.config.data.image_size
        held = memory(recipe.config, recipe.method, "ddp", gpus).total
        held += activations(recipe.method, rows, size, train.precision)
        print(
            f"| {name} | {gpus} | {batch} | {rows} | {max(0, gpus - batch)} "
            f"| {1000 * found.total:.1f} ms | {found.bound} | {batch / found.total:,.0f} "
            f"| {gain:.1f}x | {duration(steps * found.total)} | {readable(held)} |"
        )


def sweep(name: str, images: int) -> None:
    """Prints how long a model of each class takes on so many GPUs: together, or one GPU each."""
    recipe = read(name)
    train = recipe.config.train
    steps = (train.epochs or 0) * -(-images // train.batch_size)
    for gpus in SIZES:
        together = CLASSES * steps * step(recipe, gpus, train.batch_size).total
        apart = -(-CLASSES // gpus) * steps * step(recipe, 1, train.batch_size).total
        print(f"| {name} | {gpus} | {duration(together)} | {duration(apart)} |")


def main() -> None:
    for name in IMAGES:
        recipe = read(name)
        print(
            f"{name}: {recipe.flops / 1e9:.3g} GFLOP per image, {recipe.calls} operator calls of a "
            f"step, gradient {readable(recipe.gradient)}, {len(recipe.norms)} synchronised norms, "
            f"checkpoint {readable(checkpoint_bytes(recipe.config, recipe.method))}"
        )
    print(
        "\n| recipe | GPUs | images of a step | of a GPU | GPUs without | step | bound by "
        "| images/s | against one GPU | whole training | memory of a GPU |\n|" + 11 * "---|"
    )
    for name, images in IMAGES.items():
        table(name, images)
    print(
        f"\nOne model of all {CLASSES} classes, 32 images for each GPU while there are as many:\n"
    )
    for name in IMAGES:
        table(name, IMAGES_OF_ALL, batch_of_one=32)
    print(f"\nA model of each of {CLASSES} classes:\n")
    print("| recipe | GPUs | all GPUs on one class after the other | one GPU for each class |")
    print("|" + 4 * "---|")
    for name, images in IMAGES.items():
        sweep(name, images)


if __name__ == "__main__":
    main()
