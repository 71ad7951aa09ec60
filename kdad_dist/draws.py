"""Random numbers that depend on nothing but seeds: of the run for weights, of an image for images.

Every image carries a seed made of (run's seed, epoch, image). What is drawn for it is a hash of
that seed and a counter: the same on every device, for any batch it stands in, and on any number
of processes.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed 64-bit number, which torch has


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Within it, torch's global CPU generator, from which libraries draw initial weights, is
    seeded by (seed, purpose); afterwards it is as it was.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


def hashes(seed: Int64[Tensor, " b"], count: int, stream: int = 0) -> Int64[Tensor, "b {count}"]:
    """Uniform 64-bit numbers, `count` for each seed.

    Args:
        stream: tells apart what is drawn for the same image for different purposes.
    """
    counter = torch.arange(1, count + 1, device=seed.device) + (stream << 32)
    return _mix(_mix(seed)[:, None] + counter * _GOLDEN)


def uniform(seed: Int64[Tensor, " b"], count: int, stream: int = 0) -> Float[Tensor, "b {count}"]:
    """Numbers in [0, 1), `count` for each seed: the upper 24 bits, which float32 holds exactly."""
    return _shift(hashes(seed, count, stream), 40).float() / (1 << 24)


def normal(seed: Int64[Tensor, " b"], count: int, stream: int = 0) -> Float[Tensor, "b {count}"]:
    """Numbers of a standard normal distribution, `count` for each seed (Box and Muller 1958)."""
    pairs = uniform(seed, 2 * count, stream)
    radius = (-2 * torch.log1p(-pairs[:, :count])).sqrt()
    return radius * torch.cos(2 * math.pi * pairs[:, count:])


def _mix(values: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """SplitMix64's finalizer (Steele et al. 2014), in arithmetic that wraps around."""
    values = (values ^ _shift(values, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    values = (values ^ _shift(values, 27)) * (0x94D049BB133111EB - (1 << 64))
    return values ^ _shift(values, 31)


def _shift(values: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """A shift to the right that fills with zeros; torch's own copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
