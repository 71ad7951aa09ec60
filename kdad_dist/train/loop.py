"""Training: `fit` is the only training loop."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import chain, islice
from typing import cast

import torch
from torch import Tensor

from kdad_dist.config.run import RunConfig
from kdad_dist.data.loader import Loader, Micro
from kdad_dist.errors import Preempted, TrainingError
from kdad_dist.models.norm import several_values
from kdad_dist.runtime import launch, session
from kdad_dist.runtime.finished import finished
from kdad_dist.runtime.preemption import Agreement, Verdict
from kdad_dist.runtime.recorder import Recorder, SaveTimer
from kdad_dist.runtime.rundir import claimed, note, refuse_changes
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.status import after, building
from kdad_dist.runtime.stopping import StopRequest, interrupts_prevail
from kdad_dist.runtime.together import shared
from kdad_dist.runtime.tracker import check_trackers
from kdad_dist.schedule import learning_rate
from kdad_dist.train.build import Run, build, owes_validation, validates


def train(config: RunConfig, stop: StopRequest) -> None:
    """Trains the run of this configuration, or goes on where it stopped.

    Raises:
        Preempted: it was asked to stop, and saved a checkpoint if it had taken a step.
        KdadError: the configuration, the data or the numbers do not allow to go on.
    """
    check_trackers(config.track)
    launch.check_precision("train.precision", config.train.precision)
    train = config.train

    def stuck(problem: str) -> None:
        with suppress(OSError):
            after(config.directory, writes=True).write("failed", problem)

    with session.start(train.precision, train.timeout_minutes, trains=True, stuck=stuck) as here:
        refuse_changes(config)
        with ExitStack() as stack:
            if_main = [claimed(config)] if here.is_main else []
            shared(lambda: [stack.enter_context(claim) for claim in if_main])
            with building(config.directory, here.is_main), interrupts_prevail():
                if finished(config, here.is_main):
                    return
                run = build(config, here, stop)
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
        if owes_validation(run):
            metrics = validation(run, record, run.state.step)
            if not metrics:
                raise stopped(run, run.state.step)
            save(run, run.state.step, metrics, last=True)
            best = min(best, metrics["val_loss"])
        for step, micros in steps_left(run):
            done, lr = step + 1, rate(run, step)
            run.session.reseed(run.config.seed, step)
            run.session.at(done, f"step {done}")
            run.method.turn = run.method.whose_turn(step)
            losses, norm = take_step(run, micros, lr)
            agreement.note(done, is_finite(run, losses["loss"], norm))
            record.step(done, losses, norm, lr)
            # Asked only when it is heard: each time, the disk is looked at for a file.
            stopping = done % run.config.train.check_every == 0 and stop.poll() is not None
            verdict = agreement.check(done, stopping, saving.due())
            refuse_non_finite(verdict.first_bad)
            due = run.validation is not None and validates(run, done)
            metrics = validation(run, record, done) if due and not verdict.stop else {}
            unmeasured = due and not metrics  # whoever goes on from here makes up for it
            verdict = verdict.also(Verdict(stop=unmeasured))
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
            if verdict.stop and (unmeasured or done < run.steps):
                raise stopped(run, done)


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
    return losses, engine.step(lr, run.method.turn)


def rate(run: Run, step: int) -> float:
    train, per_epoch = run.config.train, run.loader.steps_per_epoch
    return learning_rate(step, run.config.optim, train.batch_size, per_epoch, run.steps)


def steps_left(run: Run) -> Iterator[tuple[int, list[Micro]]]:
    """Every step that is left to take, and its passes.

    All processes have the first in hand before any takes it. To read it may take long (a shard
    that is streamed); then a process that is asked to stop must not wait for a step to end.
    """
    steps = run.loader.steps(run.state.step, run.steps)
    first = shared(lambda: (run.starting.check(), list(islice(steps, 1)))[1])
    run.starting.over = True
    run.session.at(0, "the first step")
    return enumerate(chain(first, steps), run.state.step)


def validation(run: Run, record: Recorder, done: int) -> dict[str, float]:
    """Measures the loss on the held-out images; {} if the processes were asked to stop."""
    loss = validate(run, record, cast(Loader, run.validation), done)
    if loss is None:
        return {}
    record.validation(done, loss)
    return {"val_loss": loss}


@torch.no_grad()
def validate(run: Run, record: Recorder, loader: Loader, done: int) -> float | None:
    """The mean loss on the held-out normal images; None: all processes left it, asked to stop.

    There are as many forwards on every process, for in some modes a forward is collective.
    """
    every = run.config.train.check_every
    agreement = Agreement(run.session.device, every)
    run.method.eval()
    total = torch.zeros(2, dtype=torch.float64, device=run.session.device)
    stop = False
    for number, micros in enumerate(loader.steps(0, loader.steps_per_epoch), 1):
        run.session.at(done, f"batch {number} of the validation after step {done}")
        record.held_out(number, loader.steps_per_epoch)
        for micro in micros:
            with run.session.autocast():
                loss = run.method(micro.batch)["loss"]
            total += torch.stack([loss.double().sum(), torch.tensor(len(loss), device=loss.device)])
        asked = number % every == 0 and run.stop.poll() is not None
        stop = agreement.check(number, asked, save=False).stop
        if stop:
            break
    run.method.train()
    agreement.settle()
    loss_sum, images = run.session.sum(total).tolist()
    return None if stop else loss_sum / images


def stopped(run: Run, done: int) -> Preempted:
    return Preempted(
        f"stopped after step {done} of {run.steps}: {run.stop.poll() or 'asked elsewhere'}",
        "start the same command again to go on",
    )


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
