"""Scoring a test set: every image once, on any number of processes, to the same bits."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index, Split
from kdad_dist.data.reader import ShardReader
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.methods.readout import Moments, Readout, Standard
from kdad_dist.provenance import provenance
from kdad_dist.runtime import launch, session
from kdad_dist.runtime.deal import cut, work
from kdad_dist.runtime.output import filled, write
from kdad_dist.runtime.progress import progress, uncounted
from kdad_dist.runtime.restore import restore, save_standard
from kdad_dist.runtime.rundir import metrics_file, scores_folder
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.stopping import Stop, StopRequest, forget_requests
from kdad_dist.runtime.together import gathered, shared
from kdad_dist.runtime.tracker import send_scores
from kdad_dist.score.classes import results as class_results
from kdad_dist.score.classes import write_mistakes
from kdad_dist.score.examples import choose, write_examples, write_map
from kdad_dist.score.explain import build_explainer, mean_over, write_explained
from kdad_dist.score.parts import (
    KEPT,
    MAPS,
    PARTS,
    SYNTHETIC,
    TEST,
    VAL,
    Kept,
    Part,
    Row,
    Scored,
    Stored,
    forget,
    kept,
    read,
    work_of,
)
from kdad_dist.score.results import Results, results, warn_of_replaced
from kdad_dist.score.unit import NEW, Scorer, Unit

log = logging.getLogger(__name__)
FOLDS = (0, 1)
SAVE_EVERY = 30.0
"""Seconds of work that a process loses at most when it is killed."""


def score(config: RunConfig, request: StopRequest) -> dict[str, Any]:
    """Scores the test split of a run's data, or goes on where that stopped; writes `scores/` and
    `metrics.json`.

    Returns:
        The content of `metrics.json`, on the main process; {} on others.

    Raises:
        DataError: there is no test image, or the run directory cannot be written.
        CheckpointError: the run holds no sound checkpoint.
        Preempted: it was asked to stop; results are what they were, and what was done is kept.
    """
    with begun(config) as here:
        return score_one(config, request, here)


@contextmanager
def begun(config: RunConfig) -> Iterator[Session]:
    """The processes of the launch, none of which heeds what an earlier scoring was asked."""
    launch.check_precision("score.precision", config.score.precision)
    with session.start(timeout_minutes=config.train.timeout_minutes) as here:
        run = config.directory
        write(run, lambda: forget_requests(run) if here.is_main else None)
        yield here


def score_one(config: RunConfig, request: StopRequest, here: Session) -> dict[str, Any]:
    """Scores the checkpoint that `score.checkpoint` names."""
    index, units = shared(lambda: plan(config))
    with filled(shared(lambda: scores_folder(config)), here, KEPT, f"{PARTS}/*") as partial:
        stop = Stop(request, partial, "scoring", "goes on with the images that are left")
        trained = restore(config, explains=True)
        method = trained.method.to(here.device, memory_format=torch.channels_last)  # pyright: ignore
        data = config.data
        reader = ShardReader(data.shards, data.image_size, data.centre_margin)
        reading = (method, config.score, data.tiling)
        explainer = build_explainer(config, trained, here.device)
        scorer = Scorer(config, [Readout(*reading)], reader, here.device, explainer)
        started = time.monotonic()
        others = explainer.networks.values() if explainer else ()
        task = work_of(config, index.fingerprint, trained, others)
        before = resumed(task, len(units), partial, here)
        if config.score.standardise:
            standards = shared(lambda: standards_of(scorer, units, stop, here))
            readouts = [Readout(*reading, standard) for standard in standards]
            scorer = replace(scorer, readouts=readouts)
            facts = (standards[NEW], config, trained.step)
            write(partial, lambda: save_standard(partial, *facts) if here.is_main else None)
        left = [number for number in range(len(units)) if number not in before.units]
        parts = write(partial, lambda: run_units(scorer, units, left, partial, stop, here))
        names = sum(gathered(parts), before.names)
        seconds = before.seconds + time.monotonic() - started

        def finish() -> dict[str, Any]:
            found = concluded(scorer, units, partial, read(partial, names), stop, here)
            forget(partial)
            made = provenance(config, trained, found.timings, seconds, here.world)
            return found.metrics | {"provenance": {"fingerprint": index.fingerprint, **made}}

        metrics = write(partial, lambda: finish() if here.is_main else {})
    file = metrics_file(config)
    if here.is_main:
        warn_of_replaced(file, files.read_json(file), metrics)
    write(file, lambda: files.write_json(file, metrics) if here.is_main else None)
    if here.is_main:
        send_scores(config, metrics)
    return metrics


def resumed(task: dict[str, Any], units: int, partial: Path, here: Session) -> Kept:
    """What an earlier attempt at the same task has left, the same on all processes."""
    found = write(partial, lambda: kept(partial, task) if here.is_main else None)
    before, *_ = gathered(found)
    assert before is not None
    if before.units:
        log.info("going on: %d of %d units of work are done", len(before.units), units)
    return before


def plan(config: RunConfig) -> tuple[Index, list[Unit]]:
    """The units of work: held-out normal images, the same with synthetic defects, the test set.

    Raises:
        DataError: there is no test image.
        ConfigError: maps are to be kept, and none are made.
    """
    if config.score.save_maps != "none" and not config.makes_maps:
        raise ConfigError(
            f"score.save_maps is {config.score.save_maps}, and method.localise=none makes no maps",
            "add score.save_maps=none, or leave out method.localise=none",
        )
    index = Index.read(config.data.shards)
    data, largest = config.data, config.images_per_unit
    select = (data.category, data.normal_class, data.val_fraction, data.classes)
    test = index.select(Split.TEST, *select)
    if not test:
        raise DataError(
            f"{data.shards} holds no test image of category {data.category}",
            "pack a folder with test images, or score new images with --images",
        )
    val = index.select(Split.VAL, *select)
    kinds = [VAL, SYNTHETIC] if config.score.synthetic else [VAL]
    units = [
        Unit(kind, samples, fold)
        for kind in kinds
        for fold in FOLDS
        for samples in cut(val[fold :: len(FOLDS)], largest)
    ]
    return index, units + [Unit(TEST, samples) for samples in cut(test, largest)]


def standards_of(
    scorer: Scorer, units: Sequence[Unit], stop: Stop, here: Session
) -> list[Standard]:
    """What maps of normal images look like, the same bits on every process.

    The last one is of all held-out images, for images that are new. The first two are for the
    held-out images themselves, each of the fold that they are not in: judged by their own mean they
    would look more normal than new images do, and the threshold would be too low.

    Raises:
        DataError: fewer than two images are held out, or the method gives no maps.
    """
    held_out = [unit for unit in units if unit.kind == VAL]
    if {unit.fold for unit in held_out} != set(FOLDS):
        raise DataError(
            "score.standardise compares with held-out normal images, and there are fewer than two",
            "set score.standardise=false, or train with a larger data.val_fraction",
        )

    def moments() -> list[tuple[int, Moments]]:
        found = []
        mine = sum(len(unit.samples) for unit in held_out[here.rank :: here.world])
        with (
            progress("held-out images", mine, "images", visible=here.is_main, brief=True) as bar,
            closing(work(held_out, scorer, here)) as done,
        ):
            stop.check()
            for number, unit in done:
                maps = [image.anomaly_map for image in unit.images if image.anomaly_map is not None]
                if not maps:
                    raise DataError("the method gives no maps", "set score.standardise=false")
                here.at(0, f"held-out unit {number}")
                found.append((number, Moments.of(torch.from_numpy(np.stack(maps)))))
                bar.advance(len(maps))
                stop.check()
        return found

    parts = dict(part for share in gathered(shared(moments)) for part in share)
    others: list[list[Moments]] = [
        [parts[i] for i, unit in enumerate(held_out) if unit.fold != fold] for fold in FOLDS
    ]
    return [Standard.of(part) for part in (*others, [parts[i] for i in sorted(parts)])]


def run_units(
    scorer: Scorer,
    units: Sequence[Unit],
    left: Sequence[int],
    partial: Path,
    stop: Stop,
    here: Session,
) -> list[str]:
    """Scores this process's share of the units that are left; talks to no other process.

    Returns:
        The names of the parts that it wrote: on another machine, a folder may not show them yet.
    """
    names, part = [], Part(scorer.config)
    images = sum(len(units[number].samples) for number in left[here.rank :: here.world])
    try:
        with (
            progress("scoring", images, "images", visible=here.is_main) as bar,
            closing(work(units, scorer, here, left)) as done,
        ):
            stop.check()
            for number, unit in done:
                for image in unit.images:
                    if image.kind == TEST and image.anomaly_map is not None:
                        write_map(
                            partial / MAPS, image.sample.key, image.anomaly_map, scorer.config
                        )
                here.at(0, f"unit {number}")
                part.add(number, unit)
                bar.advance(len(unit.images))
                if time.monotonic() - part.began > SAVE_EVERY:
                    names += part.save(partial, here.world)
                    part = Part(scorer.config)
                stop.check()
    finally:
        names += part.save(partial, here.world)
    here.at(2, "the end of its share")
    return names


def concluded(
    scorer: Scorer,
    units: Sequence[Unit],
    partial: Path,
    parts: Iterable[Stored],
    stop: Stop,
    here: Session,
) -> Results:
    """What all parts add up to; writes the table of scores and the examples."""
    if not scorer.config.tells_classes:
        with uncounted("computing the figures"):
            found = results(scorer.config, partial, parts)
        examples(scorer, units, found.tested, partial, stop, here)
        return found
    samples = {sample.key: sample for unit in units for sample in unit.samples}
    found = class_results(scorer.config, partial, parts)

    def load(key: str) -> NDArray[np.uint8]:
        return scorer.reader.image(samples[key])

    write_mistakes(partial / "examples", found.tested, load)
    if scorer.explainer is None:
        return found
    folder, classes = partial / "explained", scorer.config.data.classes or ()
    write_explained(folder, classes, found.tested, scorer.explainer, load)
    agreement = mean_over(found.tested)
    return found._replace(metrics=found.metrics | {"agreement": agreement})


def examples(
    scorer: Scorer,
    units: Sequence[Unit],
    tested: Sequence[Row],
    partial: Path,
    stop: Stop,
    here: Session,
) -> None:
    """Scores again what is worth looking at, and keeps its pictures."""
    samples = {s.key: s for unit in units if unit.kind == TEST for s in unit.samples}
    with progress("examples", len(list(choose(tested))), "images", brief=True) as bar:

        def outcome(key: str) -> Scored:
            here.at(1, "the examples")
            stop.check()
            bar.advance()
            return scorer(Unit(TEST, [samples[key]])).images[0]

        write_examples(
            partial / "examples", tested, outcome, lambda key: scorer.load(TEST, samples[key])[0]
        )
