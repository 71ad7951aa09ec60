"""Training: `build` assembles a run from its configuration, `fit` is the only training loop."""

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdad_dist.config import RunConfig
from kdad_dist.data.index import Index
from kdad_dist.data.loader import Loader, Micro
from kdad_dist.errors import Preempted, TrainingError
from kdad_dist.methods import build_method
from kdad_dist.methods.base import Method
from kdad_dist.models.norm import several_values
from kdad_dist.models.weights import load_weights, read_weights
from kdad_dist.runtime import account, launch, session
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation, TrainState
from kdad_dist.runtime.engine import Engine, build_engine
from kdad_dist.runtime.finished import finished, say_so
from kdad_dist.runtime.flops import operations
from kdad_dist.runtime.identity import frozen_weights
from kdad_dist.runtime.loaders import open_loaders
from kdad_dist.runtime.modes import refuse_mode
from kdad_dist.runtime.preemption import Agreement, StopRequest
from kdad_dist.runtime.recorder import Recorder, SaveTimer
from kdad_dist.runtime.rundir import claimed, note, refuse_changes
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.status import building
from kdad_dist.runtime.together import shared
from kdad_dist.runtime.tracker import check_trackers
from kdad_dist.schedule import learning_rate

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
    steps: int
    """Optimizer steps of the whole training."""
    operations: float
    """Floating-point operations that an image costs, forward and backward."""
    stop: StopRequest


def train(config: RunConfig) -> None:
    """Trains the run of this configuration, or goes on where it stopped.

    Raises:
        Preempted: it was asked to stop, and saved a checkpoint.
        KdadError: the configuration, the data or the numbers do not allow to go on.
    """
    check_trackers(config.track)
    launch.check_precision("train.precision", config.train.precision)
    with session.start(config.train.precision, trains=True) as here:
        refuse_changes(config)
        with ExitStack() as stack:
            if_main = [claimed(config)] if here.is_main else []
            shared(lambda: [stack.enter_context(claim) for claim in if_main])
            with building(config.directory, here.is_main):
                if finished(config, here.is_main):
                    return
                run = build(config, here)
                if here.is_main:
                    note(config, run.index)
            fit(run)


def fit(run: Run) -> None:
    """Takes every optimizer step that is left to take."""
    stop = run.stop
    agreement = Agreement(run.session.device, run.config.train.check_every)
    record = Recorder(run.config, run.session, run.loader, run.state, run.steps, run.operations)
    saving, best = SaveTimer(run.config), run.best
    run.method.train()
    with record.recording(), stop.heeding_interrupts():
        for step, micros in enumerate(run.loader.steps(run.state.step, run.steps), run.state.step):
            done, lr = step + 1, rate(run, step)
            run.session.reseed(run.config.seed, step)  # dropout: the same after a resume
            losses, norm = take_step(run, micros, lr)
            agreement.note(done, is_finite(run, losses["loss"], norm))
            record.step(done, losses, norm, lr)
            # Asked only when it is heard: each time, the disk is looked at for a file.
            stopping = done % run.config.train.check_every == 0 and stop.poll() is not None
            verdict = agreement.check(done, stopping, saving.due())
            refuse_non_finite(verdict.first_bad)
            metrics: dict[str, float] = {}
            if run.validation and validates(run, done):
                metrics["val_loss"] = validate(run, run.validation)
                record.validation(done, metrics["val_loss"])
            # Early on nearly every validation improves: validate_every bounds how often it saves.
            improved = metrics.get("val_loss", math.inf) < best
            if improved or verdict.save or verdict.stop or saving.at(done) or done == run.steps:
                verdict = verdict.also(agreement.settle())
                refuse_non_finite(verdict.first_bad)
                with record.saving(done):
                    save(run, done, metrics, last=verdict.stop or done == run.steps)
                best = min(best, metrics.get("val_loss", best))
                saving.restart()
            if metrics or verdict.save or saving.at(done):
                record.restart_clock(done)
            if verdict.stop and done < run.steps:
                raise Preempted(
                    f"stopped after step {done} of {run.steps}: {stop.poll() or 'asked elsewhere'}",
                    "start the same command again to go on",
                )


def take_step(run: Run, micros: list[Micro], lr: float) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer update on the rows of all micro-batches.

    Engines average gradients over processes, so this process's sum is weighted by `world` and
    divided by the images of the whole step.

    Returns:
        The losses of this process's rows over the images of the step (summed over processes they
        are the means), and the norm of the whole gradient before clipping.
    """
    engine, here = run.engine, run.session
    losses: dict[str, Tensor] = {}
    for i, micro in enumerate(micros):
        with engine.micro(last=i == len(micros) - 1), here.autocast(), several_values():
            terms = {k: v.sum() / micro.step_images for k, v in run.method(micro.batch).items()}
            engine.backward(terms["loss"] * here.world)
        losses = {k: losses.get(k, 0) + v.detach() for k, v in terms.items()}
    return losses, engine.step(lr)


def rate(run: Run, step: int) -> float:
    train, per_epoch = run.config.train, run.loader.steps_per_epoch
    return learning_rate(step, run.config.optim, train.batch_size, per_epoch, run.steps)


@torch.no_grad()
def validate(run: Run, loader: Loader) -> float:
    """The mean loss on the held-out normal images; as many forwards on every process."""
    run.method.eval()
    total = torch.zeros(2, dtype=torch.float64, device=run.session.device)
    for micros in loader.steps(0, loader.steps_per_epoch):
        for micro in micros:
            with run.session.autocast():
                loss = run.method(micro.batch)["loss"]
            total += torch.stack([loss.double().sum(), torch.tensor(len(loss), device=loss.device)])
    run.method.train()
    loss_sum, images = run.session.sum(total).tolist()
    return loss_sum / images


def validates(run: Run, done: int) -> bool:
    """At the end of every `validate_every`-th epoch, and at the very end."""
    per_epoch = run.loader.steps_per_epoch
    return done == run.steps or done % (per_epoch * run.config.train.validate_every) == 0


def refuse_non_finite(first_bad: int | None) -> None:
    if first_bad is not None:
        raise TrainingError(
            f"the loss or the gradient of step {first_bad} is not finite; its update was not "
            "applied and nothing was saved since",
            "lower optim.lr, set optim.clip, or use train.precision=no, in a run of another "
            "`output`; or add train.changed_config=accept to go on from the last checkpoint",
        )


def save(run: Run, done: int, metrics: dict[str, float], last: bool) -> None:
    """Saves, or begins to where `checkpoint.asynchronous`; the last of a start is waited for."""
    state = TrainState(done, run.loader.samples_seen(done))
    run.checkpoints.save(run.engine.contents, state, metrics | run.engine.facts())
    if last:
        run.checkpoints.wait()


def is_finite(run: Run, loss: Tensor, norm: Tensor) -> Tensor:
    """Whether a step went well. Under fp16 gradients overflow in the normal course of things,
    the scaler then skips the update and lowers its scale.
    """
    if run.config.train.precision == "fp16":
        return loss.isfinite()
    return loss.isfinite() & norm.isfinite()


def build(config: RunConfig, here: Session) -> Run:
    """Assembles the run: data, method, optimizer, and the newest checkpoint that verifies."""
    stop = StopRequest(config.directory, config.train.max_time)  # heeded from the first step on
    index, method, identity, loader, validation = shared(lambda: assemble(config, here))
    cost = operations(method, config.data.image_size)
    images = loader.samples_seen(loader.steps_per_epoch)
    log.info(account.expected(config, method, images, here.mode, here.world))
    engine = build_engine(config, method, here)
    keep = Rotation(config.checkpoint.keep, config.checkpoint.keep_hours)
    checkpoints = CheckpointManager(
        config.directory / "checkpoints", keep, identity, config.checkpoint.asynchronous
    )
    state, best = resume(checkpoints, engine)
    epochs = config.train.epochs or 0
    steps = config.train.steps or epochs * loader.steps_per_epoch
    if state.step >= steps:
        say_so(config.directory, steps)
    elif state.step:
        log.info("going on from step %d of %d", state.step, steps)
    return Run(
        config,
        here,
        index,
        method,
        engine,
        loader,
        validation,
        checkpoints,
        state,
        best,
        steps,
        cost,
        stop,
    )


def assemble(
    config: RunConfig, here: Session
) -> tuple[Index, Method, dict[str, str], Loader, Loader | None]:
    """What a process makes by itself: index, method on its device, what checkpoints must agree
    with, loaders of both splits.
    """
    index, method = make(config)
    identity = own_identity(index, method)
    refuse_mode(config, method, here.mode, here.world)
    # FSDP2 cuts up parameters in their plain order and takes no other.
    order = torch.contiguous_format if here.mode == "fsdp2" else torch.channels_last
    method.to(here.device, memory_format=order)  # pyright: ignore[reportCallIssue]
    return index, method, identity, *open_loaders(config, index, method, here)


def make(config: RunConfig) -> tuple[Index, Method]:
    """The index of the data, and the method with the weights that training starts from."""
    index = Index.read(config.data.shards)
    method = build_method(config)
    if config.train.init_from:
        weights = read_weights(Path(config.train.init_from), "train.init_from")
        load_weights(method.student, weights, "train.init_from")
    return index, method


def own_identity(index: Index, method: Method) -> dict[str, str]:
    """What the checkpoints of a run must agree with, though they do not hold it."""
    return {"data": index.fingerprint, **frozen_weights(method)}


def resume(checkpoints: CheckpointManager, engine: Engine) -> tuple[TrainState, float]:
    """Loads the newest checkpoint that verifies, if any; the state, and the best loss so far."""
    path = checkpoints.latest()
    if path is None:
        return TrainState(step=0, samples_seen=0), math.inf
    state = checkpoints.load(path, engine.contents)
    engine.restore(checkpoints.manifest(path)["metrics"])
    best = checkpoints.best()
    return state, math.inf if best is None else checkpoints.manifest(best)["metrics"]["val_loss"]
