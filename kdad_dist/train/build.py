"""Assembles a run from its configuration: data, method, engine, and what a checkpoint holds."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index
from kdad_dist.data.labels import check_classes
from kdad_dist.data.loader import Loader
from kdad_dist.methods.base import Method
from kdad_dist.models.weights import load_weights, read_weights
from kdad_dist.runtime import account
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation
from kdad_dist.runtime.classifiers import Sources, choose_sources, make_method
from kdad_dist.runtime.engine import Engine
from kdad_dist.runtime.engines import build_engine
from kdad_dist.runtime.finished import say_so
from kdad_dist.runtime.flops import operations
from kdad_dist.runtime.identity import frozen_weights, refuse_others
from kdad_dist.runtime.launch import check_compiler
from kdad_dist.runtime.loaders import check_shards, first_images, open_loaders
from kdad_dist.runtime.modes import refuse_mode
from kdad_dist.runtime.progress import uncounted
from kdad_dist.runtime.restore import start_from
from kdad_dist.runtime.rundir import CHECKPOINTS
from kdad_dist.runtime.saved import Checkpoints, TrainState
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.stopping import Stop, StopRequest
from kdad_dist.runtime.together import shared
from kdad_dist.types import Poll
from kdad_dist.wording import amount

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that a training needs, assembled, its weights at `state`."""

    config: RunConfig
    session: Session
    index: Index
    method: Method
    engine: Engine
    loader: Loader
    validation: Loader | None
    checkpoints: CheckpointManager
    state: TrainState
    best: float
    """Lowest loss on the held-out images up to `state`; infinite before the first."""
    measured: bool
    """Whether they were measured at `state`; a request to stop may have come before."""
    steps: int
    """Optimizer steps of the whole training."""
    operations: float
    """Floating-point operations that an image costs, forward and backward."""
    starting: Stop
    """What a process heeds by itself, until it takes steps together with the others."""

    @property
    def stop(self) -> StopRequest:
        return self.starting.request


def build(config: RunConfig, here: Session, stop: StopRequest) -> Run:
    """Assembles the run: data, method, optimizer, and the newest checkpoint that verifies.

    Raises:
        Preempted: it was asked to stop, here or in another process.
    """
    starting = Stop(stop, config.directory, "the start", "begins where this one did")

    def poll(done: int = 0) -> None:
        here.at(-1, "its start")
        starting.check()

    folder = config.directory / CHECKPOINTS
    keep = Rotation(config.checkpoint.keep, config.checkpoint.keep_hours)
    newest = Checkpoints(folder).latest()
    sources = choose_sources(config, trains=True)
    index, method, identity, loader, held_out = shared(
        lambda: assemble(config, here, sources, newest is None, poll)
    )
    refuse_others(identity)
    cost = operations(method, config.data.network_size)
    images = loader.samples_seen(loader.steps_per_epoch) // config.data.tiling.count
    if config.doubt:
        log.warning(config.doubt)
    log.info(account.expected(config, method, images, here.mode, here.world))
    engine = build_engine(config, method, here)
    checkpoints = CheckpointManager(folder, keep, identity, config.checkpoint.asynchronous)
    state, best, measured = resume(checkpoints, engine, newest)
    epochs = config.train.epochs or 0
    steps = config.train.steps or epochs * loader.steps_per_epoch
    run = Run(
        config,
        here,
        index,
        method,
        engine,
        loader,
        held_out,
        checkpoints,
        state,
        best,
        measured,
        steps,
        cost,
        starting,
    )
    if state.step >= steps and not owes_validation(run):
        say_so(config.directory, steps)
    elif state.step:
        log.info("going on from step %d of %d", state.step, steps)
    return run


def assemble(
    config: RunConfig, here: Session, sources: Sources, fresh: bool, poll: Poll
) -> tuple[Index, Method, dict[str, str], Loader, Loader | None]:
    """What a process makes by itself: index, method on its device, what checkpoints must agree
    with, loaders of both splits.
    """
    poll()
    if config.train.compile and here.device.type == "cpu":
        check_compiler()
    index, method = make(config, sources, fresh)
    poll()
    identity = own_identity(index, method)
    refuse_mode(config, method, here.mode)
    # The others cut up parameters in their plain order and take no other.
    order = torch.channels_last if here.mode == "ddp" else torch.contiguous_format
    method.to(here.device, memory_format=order)  # pyright: ignore[reportCallIssue]
    loaders = open_loaders(config, index, method, here, poll)
    if method.wants_images:
        with uncounted(f"preparing the method on {amount(method.wants_images, 'image')}"):
            method.prepare(first_images(config, index, method, here.device))
    return index, method, identity, *loaders


def make(config: RunConfig, sources: Sources, fresh: bool) -> tuple[Index, Method]:
    """The index of the data, and the method; a fresh one has the weights that training starts from,
    which a run that goes on does not need any more.
    """
    index = Index.read(config.data.shards)
    check_shards(config, index)
    if config.tells_classes:
        check_classes(list(index.samples), config.data.classes, index.root, index.layout)
    with uncounted("building the networks"):
        method = make_method(config, sources, trains=True)
    if fresh and config.train.init_from:
        source = Path(config.train.init_from)
        if source.is_dir():
            start_from(source, method)
        else:
            weights = read_weights(source, "train.init_from")
            load_weights(method.network, weights, "train.init_from")
        log.info("the student starts from %s", source)
    return index, method


def own_identity(index: Index, method: Method) -> dict[str, str]:
    """What the checkpoints of a run must agree with, though they do not hold it."""
    return {"data": index.fingerprint, **frozen_weights(method)}


def resume(
    checkpoints: CheckpointManager, engine: Engine, path: Path | None
) -> tuple[TrainState, float, bool]:
    """Loads a checkpoint, if there is one.

    Returns:
        The state, the best loss so far, and whether the loss at that state was measured.
    """
    if path is None:
        return TrainState(step=0, samples_seen=0), math.inf, False
    state = checkpoints.load(path, engine.contents)
    metrics = shared(lambda: checkpoints.manifest(path))["metrics"]
    engine.restore(metrics)
    best = checkpoints.best()
    lowest = math.inf if best is None else checkpoints.manifest(best)["metrics"]["val_loss"]
    return state, lowest, "val_loss" in metrics


def owes_validation(run: Run) -> bool:
    """Whether the run was stopped before the held-out images were measured at its state."""
    due = run.state.step > 0 and run.validation is not None and validates(run, run.state.step)
    return due and not run.measured


def validates(run: Run, done: int) -> bool:
    """At the end of every `validate_every`-th epoch, and at the very end."""
    per_epoch = run.loader.steps_per_epoch
    return done == run.steps or done % (per_epoch * run.config.train.validate_every) == 0
