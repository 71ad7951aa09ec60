"""`kdad train --dry-run`: what a training on any number of processes would do, found out on one.

What `train` refuses at its start is refused here in the same words, by the same code, but for what
belongs to the machine or the launch: a compiler, a precision, a directory that is in use. Neither a
GPU nor other processes are needed; no folder is made, no image is decoded but one of each shard.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

from kdad_dist.config.methods import LoraMaeConfig
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index, Sample
from kdad_dist.data.loader import AHEAD
from kdad_dist.data.plan import Plan, StreamPlan
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.source import is_remote
from kdad_dist.methods.base import Method
from kdad_dist.runtime.account import checkpoint_bytes, memory, pixel_bytes
from kdad_dist.runtime.activations import activations
from kdad_dist.runtime.classifiers import choose_sources
from kdad_dist.runtime.flops import operations
from kdad_dist.runtime.loaders import choose, indexed_plan, read_as, stream_plan
from kdad_dist.runtime.modes import refuse_mode
from kdad_dist.runtime.progress import uncounted
from kdad_dist.runtime.rundir import CHECKPOINTS, refuse_changes
from kdad_dist.runtime.saved import Checkpoints
from kdad_dist.runtime.tensors import Tensors
from kdad_dist.runtime.tracker import check_trackers
from kdad_dist.schedule import learning_rate
from kdad_dist.train.build import make, own_identity
from kdad_dist.wording import amount, readable

Facts = dict[str, Any]
FLOAT = 4
"""Bytes of a number of a batch, as the device gets it."""


def dry_run(config: RunConfig, world: int, mode: str) -> Facts:
    """What training would do on so many processes in a mode.

    Raises:
        KdadError: training would be refused.
    """
    check_trackers(config.track)
    refuse_changes(config)
    saved = Checkpoints(config.directory / CHECKPOINTS).latest()
    sources = choose_sources(config, trains=True)
    with FakeTensorMode() if saved is None and draws_all(config) else nullcontext():
        index, method = make(config, sources, fresh=saved is None)
    refuse_mode(config, method, mode)
    train, held_out = choose(config, index, method)
    look_at(config, index, [*train, *held_out])
    step = 0 if saved is None else step_of(saved, index, method)
    steps, batches = batches_of(config, train, world)
    pixels = pixel_bytes(config, len(train) + len(held_out))
    with uncounted("adding up memory and arithmetic"):
        bytes_held = held(config, method, mode, world, batches, pixels)
        arithmetic = operations(method, config.data.network_size)
    return {
        "name": config.name,
        "processes": world,
        "mode": mode,
        "precision": config.train.precision,
        "run": {"directory": str(config.directory), "step": step},
        "data": {
            "shards": config.data.shards,
            "training_images": len(train),
            "held_out_images": len(held_out),
            "image_size": config.data.image_size,
            "tiles_per_image": config.data.tiling.count,
            "network_size": config.data.network_size,
            "pixel_cache_bytes": pixels,
        },
        "steps": steps,
        "batches": batches,
        "learning_rate": rates(config, steps),
        "memory": bytes_held,
        "checkpoint": {
            "bytes": checkpoint_bytes(config, method),
            "kept": config.checkpoint.keep,
        },
        "operations_per_image": arithmetic,
        "notes": list(notes(config, len(train), batches, world)),
    }


def look_at(config: RunConfig, index: Index, samples: Sequence[Sample]) -> None:
    """Reads the last image of each shard: one that is missing or cut short is refused."""
    data = config.data
    reader = ShardReader(index.root, *read_as(data, data.augment))
    if is_remote(index.root) and data.access == "stream":  # its server may give whole files only
        return
    for sample in {sample.shard: sample for sample in samples}.values():
        reader.image(sample)


def draws_all(config: RunConfig) -> bool:
    """Whether no weight is read: a large network need not exist then to be measured."""
    drawn = isinstance(config.method, LoraMaeConfig) and config.method.weights == "random"
    return drawn and not config.train.init_from


def step_of(saved: Path, index: Index, method: Method) -> int:
    """The step that training would go on from, once it is clear that the checkpoint fits."""
    checkpoints = Checkpoints(saved.parent, own_identity(index, method))
    return checkpoints.check(saved, Tensors(method.student))["step"]


def batches_of(config: RunConfig, train: Sequence[Sample], world: int) -> tuple[Facts, Facts]:
    """How long the training is, and who reads how much of it."""
    plan_for = stream_plan if config.data.access == "stream" else indexed_plan
    plan = plan_for(config, train, 0, world)
    per_epoch = plan.steps_per_epoch
    total = config.train.steps or (config.train.epochs or 0) * per_epoch
    full, last = parts_of(plan, 0), parts_of(plan, per_epoch - 1)
    rows = np.array(full["rows"])
    if isinstance(plan, StreamPlan):
        read = [sum(len(plan.shards[shard]) for shard in shards) for shards in plan.deal(0)]
    else:
        read = ((per_epoch - 1) * rows + np.array(last["rows"])).tolist()
    return (
        {"per_epoch": per_epoch, "total": total, "epochs": total / per_epoch},
        {
            "batch_size": config.train.batch_size,
            "full": full,
            "last": last,
            "images_of_an_epoch": read,
        },
    )


def parts_of(plan: Plan | StreamPlan, step: int) -> Facts:
    """A step of the first epoch: its images, passes, and the rows of each process."""
    every = [next(replace(plan, rank=rank).steps(step, step + 1)) for rank in range(plan.world)]
    sizes = np.array([[len(part.rows) for part in parts] for parts in every])
    return {
        "images": int(sizes.sum()),
        "passes": sizes.shape[1],
        "rows": sizes.sum(axis=1).tolist(),
        "largest_pass": int(sizes.max()),
    }


def rates(config: RunConfig, steps: Facts) -> list[Facts]:
    """The learning rate at the start, after the warm-up, along the way, and at the end."""
    per_epoch, total = steps["per_epoch"], steps["total"]
    warm = round(config.optim.warmup_epochs * per_epoch)
    wanted = {0, warm, total // 4, total // 2, 3 * total // 4, total - 1}
    return [
        {
            "step": step + 1,
            "lr": learning_rate(step, config.optim, config.train.batch_size, per_epoch, total),
        }
        for step in sorted(wanted)
        if step < total
    ]


def held(
    config: RunConfig, method: Method, mode: str, world: int, batches: Facts, pixels: int
) -> Facts:
    """Bytes of the process that holds most."""
    size = config.data.network_size
    largest = max(batches[step]["largest_pass"] for step in ("full", "last"))
    parts = {
        **asdict(memory(config, method, mode, world)),
        "activations": activations(method, largest, size, config.train.precision),
        "images_read_ahead": AHEAD * max(batches["full"]["rows"]) * 3 * size**2 * FLOAT,
        "pixels": pixels if config.data.cache == "device" else 0,
    }
    return {**parts, "total": sum(parts.values())}


def notes(config: RunConfig, images: int, batches: Facts, world: int) -> Iterator[str]:
    """What one should know before asking for so many processes."""
    full, last = batches["full"], batches["last"]
    idle = full["rows"].count(0)
    if idle:
        yield f"{idle} of {world} processes have no image in a full step, and only wait: " + (
            "each reads whole shards, and there are too few or too unequal ones"
            if config.data.access == "stream"
            else f"train.batch_size={world} or more would give each of them one"
            if images >= world
            else f"there are {images} training images only"
        )
    elif len(set(full["rows"])) > 1 or len(set(last["rows"])) > 1:
        yield "not every step gives all processes as many images: losses are weighted by images"
    if config.doubt:
        yield config.doubt
    if config.train.precision == "fp16":
        yield "precision fp16 needs GPUs"
    if config.train.compile:
        yield "what train.compile saves of activations is not counted"
    if config.data.access == "stream" and is_remote(config.data.shards):
        yield "the shards at the address were not looked at, only their index"


def told(facts: Facts) -> str:
    """The facts for a person."""
    data, steps, batches = facts["data"], facts["steps"], facts["batches"]
    memory, run = facts["memory"], facts["run"]
    number = amount(facts["processes"], "process", "processes")
    where = f"goes on from step {run['step']}" if run["step"] else "starts anew"
    if run["step"] >= steps["total"]:
        where = "is finished"
    lines = [
        f"{facts['name']} on {number}, mode {facts['mode']}, precision {facts['precision']}",
        f"run: {run['directory']}, {where}",
        f"data: {data['training_images']} training images, {data['held_out_images']} held out, "
        f"{data['image_size']} px; decoded {readable(data['pixel_cache_bytes'])}",
        *tiled(data),
        f"steps: {steps['per_epoch']} in an epoch, {steps['total']} in all "
        f"({steps['epochs']:.4g} epochs)",
        f"a full step: {shared_out(batches['full'])}",
    ]
    if batches["last"] != batches["full"]:
        lines.append(f"the last step of an epoch: {shared_out(batches['last'])}")
    lines.append(f"an epoch: images of a process: {counted(batches['images_of_an_epoch'])}")
    rates = ", ".join(f"{rate['lr']:.3g} at {rate['step']}" for rate in facts["learning_rate"])
    parts = ", ".join(
        f"{k.replace('_', ' ')} {readable(v)}" for k, v in memory.items() if v and k != "total"
    )
    checkpoint = facts["checkpoint"]
    lines += [
        f"learning rate: {rates}",
        f"memory of a process: {readable(memory['total'])} ({parts}), beside the program itself: "
        "torch, its libraries, and what these work in",
        f"a checkpoint: {readable(checkpoint['bytes'])}, of which {checkpoint['kept']} and the "
        "best are kept",
        f"work: {facts['operations_per_image'] / 1e9:.3g} GFLOP per image",
        *(f"note: {note}" for note in facts["notes"]),
    ]
    return "\n".join(lines)


def tiled(data: Facts) -> Iterator[str]:
    """That what is counted as an image from here on is a tile, where that is so."""
    number, side = data["tiles_per_image"], data["network_size"]
    if number > 1:
        yield f"an image is cut into {number} tiles of {side} px, which count as images below"


def shared_out(step: Facts) -> str:
    passes = amount(step["passes"], "pass", "passes")
    return f"{step['images']} images in {passes}; of a process: {counted(step['rows'])}"


def counted(numbers: Sequence[int]) -> str:
    """5 (3 times), 4 (13 times); or 4, where all are the same."""
    found = Counter(numbers)
    if len(found) == 1:
        return str(numbers[0])
    return ", ".join(f"{n} ({times} of {len(numbers)})" for n, times in sorted(found.items())[::-1])
