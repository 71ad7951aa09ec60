"""Scoring a test set: every image once, on any number of processes, to the same bits."""

import csv
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdad_dist.config import RunConfig, digest
from kdad_dist.data.index import Index, Sample, Split
from kdad_dist.data.loader import to_float
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.synthetic import synthetic_defect
from kdad_dist.errors import DataError
from kdad_dist.methods.readout import Detector, Moments, Standard, readout_of
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.metrics.image import rates
from kdad_dist.runtime import environment, files, session
from kdad_dist.runtime.deal import cut, work
from kdad_dist.runtime.output import filled, write
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.restore import Trained, restore, save_standard
from kdad_dist.runtime.rundir import metrics_file, scores_folder
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.together import gathered, shared
from kdad_dist.score_examples import write_examples, write_map

log = logging.getLogger(__name__)
VAL, SYNTHETIC, TEST = "val", "synthetic", "test"
FOLDS = (0, 1)
NEW = -1
ENOUGH = 20
"""Held-out images below which a quantile of their scores says little of others."""


class Unit(NamedTuple):
    """Images that go through the network together."""

    kind: str
    samples: Sequence[Sample]
    fold: int = NEW
    """Half of the held-out images that these belong to."""


@dataclass(frozen=True)
class Scored:
    """One image's outcome."""

    kind: str
    sample: Sample
    pred_score: float
    anomaly_map: NDArray[np.float32] | None
    gt_mask: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Scorer:
    """Reads, scores and keeps what one process needs to do so."""

    config: RunConfig
    detectors: Sequence[Detector]
    """One, or (`score.standardise`) those for the folds of held-out images and one for new ones."""
    reader: ShardReader
    device: torch.device

    def __call__(self, unit: Unit) -> list[Scored]:
        pairs = [self.load(unit.kind, sample) for sample in unit.samples]
        pixels = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
        detector = self.detectors[unit.fold if len(self.detectors) > 1 else NEW]
        prediction = detector(to_float(pixels, self.device))
        assert prediction.pred_score is not None
        scores = prediction.pred_score.tolist()
        maps = prediction.anomaly_map
        host = [None] * len(pairs) if maps is None else maps.cpu().numpy()
        return [
            Scored(unit.kind, sample, score, anomaly_map, mask)
            for sample, score, anomaly_map, (_, mask) in zip(
                unit.samples, scores, host, pairs, strict=True
            )
        ]

    def load(self, kind: str, sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Pixels (s, s, 3) and ground truth (s, s), None where it is not known."""
        image = self.reader.image(sample)
        if kind == SYNTHETIC:
            return synthetic_defect(image, sample.key, self.config.seed)
        known = sample.mask is not None or sample.gt_label == 0
        return image, self.reader.mask(sample) if known else None


def score(config: RunConfig) -> dict[str, Any]:
    """Scores the test split of a run's data; writes `scores/` and `metrics.json`.

    Returns:
        The content of `metrics.json`, on the main process; {} on others.

    Raises:
        DataError: there is no test image, or the run directory cannot be written.
        CheckpointError: the run holds no sound checkpoint.
    """
    with session.start() as here:
        index, units = shared(lambda: plan(config))
        with filled(shared(lambda: scores_folder(config)), here) as partial:
            trained = restore(config)
            method = trained.method.to(here.device, memory_format=torch.channels_last)  # pyright: ignore
            reader = ShardReader(config.data.shards, config.data.image_size)
            scorer = Scorer(config, [Detector(method, config.score)], reader, here.device)
            started = time.monotonic()
            if config.score.standardise:
                standards = standards_of(scorer, units, here)
                detectors = [Detector(method, config.score, standard) for standard in standards]
                scorer = replace(scorer, detectors=detectors)
                of_all = standards[NEW]
                write(partial, lambda: save_standard(partial, of_all) if here.is_main else None)
            write(partial, lambda: run_units(scorer, units, partial, here))
            seconds = time.monotonic() - started
            origin = provenance(config, index, trained, units, seconds, here)
            metrics = write(
                partial, lambda: results(scorer, units, partial, origin) if here.is_main else {}
            )
        file = metrics_file(config)
        write(file, lambda: files.write_json(file, metrics) if here.is_main else None)
    return metrics


def plan(config: RunConfig) -> tuple[Index, list[Unit]]:
    """The units of work: held-out normal images, the same with synthetic defects, the test set.

    Raises:
        DataError: there is no test image.
    """
    index = Index.read(config.data.shards)
    data, largest = config.data, config.score.batch_size
    select = (data.category, data.normal_class, data.val_fraction)
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


def standards_of(scorer: Scorer, units: Sequence[Unit], here: Session) -> list[Standard]:
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
        for number, results in work(held_out, scorer, here):
            maps = [result.anomaly_map for result in results if result.anomaly_map is not None]
            if not maps:
                raise DataError("the method gives no maps", "set score.standardise=false")
            found.append((number, Moments.of(torch.from_numpy(np.stack(maps)))))
        return found

    parts = dict(part for share in gathered(shared(moments)) for part in share)
    kept: list[list[Moments]] = [
        [parts[i] for i, unit in enumerate(held_out) if unit.fold != fold] for fold in FOLDS
    ]
    return [Standard.of(part) for part in (*kept, [parts[i] for i in sorted(parts)])]


def run_units(scorer: Scorer, units: Sequence[Unit], partial: Path, here: Session) -> None:
    """Scores this process's share and writes it down; talks to no other process."""
    test, synthetic, rows = Evaluation(), Evaluation(), []
    images = sum(len(unit.samples) for unit in units[here.rank :: here.world])
    with progress("scoring", images, "images", visible=here.is_main) as bar:
        for number, results in work(units, scorer, here):
            for place, result in enumerate(results):
                account(result, test, synthetic if scorer.config.score.synthetic else None)
                rows.append({"order": [number, place], **row(result)})
                if result.kind == TEST and result.anomaly_map is not None:
                    write_map(
                        partial / "maps", result.sample.key, result.anomaly_map, scorer.config
                    )
            bar.advance(len(results))
    name = f"rank_{here.rank:05d}"
    test.save(partial / f"{name}_test.npz")
    synthetic.save(partial / f"{name}_synthetic.npz")
    files.write_json(partial / f"{name}_rows.json", rows)


def account(result: Scored, test: Evaluation, synthetic: Evaluation | None) -> None:
    """Measures a result; held-out images only where they are compared with synthetic defects."""
    sample, measured = result.sample, (result.pred_score, result.anomaly_map, result.gt_mask)
    if result.kind == TEST:
        assert sample.gt_label is not None
        test.update(sample.key, sample.category, sample.defect_type, sample.gt_label, *measured)
    elif synthetic is None:
        return
    elif result.kind == VAL:
        synthetic.update(sample.key, sample.category, None, 0, *measured)
    else:
        synthetic.update(f"{sample.key} (defect)", sample.category, SYNTHETIC, 1, *measured)


def row(result: Scored) -> dict[str, Any]:
    sample, anomaly_map = result.sample, result.anomaly_map
    return {
        "kind": result.kind,
        "key": sample.key,
        "category": sample.category,
        "defect_type": sample.defect_type,
        "gt_label": sample.gt_label,
        "pred_score": result.pred_score,
        "map_max": None if anomaly_map is None else float(anomaly_map.max()),
    }


def results(
    scorer: Scorer, units: Sequence[Unit], partial: Path, origin: dict[str, Any]
) -> dict[str, Any]:
    """Turns what all processes wrote into the results; the content of `metrics.json`."""
    config = scorer.config
    rows = [r for file in partial.glob("*_rows.json") for r in json.loads(file.read_bytes())]
    rows.sort(key=lambda r: r["order"])
    test, synthetic = merged(partial, "test"), merged(partial, "synthetic")
    limit = threshold(config, [r for r in rows if r["kind"] == VAL])
    metrics = {
        **test.report(limit["value"]),
        "threshold": limit | rates_at(limit["value"], test),
        "synthetic": synthetic.report()["mean"] if config.score.synthetic else None,
        "provenance": origin,
    }
    tested = [r for r in rows if r["kind"] == TEST]
    for r in tested:
        r["pred_label"] = None if limit["value"] is None else int(r["pred_score"] > limit["value"])
    write_scores(partial / "scores.csv", tested)
    files.write_json(partial / "curves.json", test.curves())
    samples = {s.key: s for unit in units if unit.kind == TEST for s in unit.samples}
    write_examples(
        partial / "examples",
        tested,
        lambda key: scorer(Unit(TEST, [samples[key]]))[0],
        lambda key: scorer.load(TEST, samples[key])[0],
    )
    for file in partial.glob("rank_*"):
        file.unlink()
    return metrics


def rates_at(limit: float | None, test: Evaluation) -> dict[str, float | None]:
    """The rates that a threshold gives on the test set; unknown where there is no threshold."""
    if limit is None:
        return {"false_positive_rate": None, "true_positive_rate": None}
    return rates(*test.labels_and_scores(), limit)


def merged(partial: Path, name: str) -> Evaluation:
    evaluation = Evaluation()
    for file in sorted(partial.glob(f"rank_*_{name}.npz")):
        evaluation.merge(Evaluation.load(file))
    return evaluation


def threshold(config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The quantile of held-out normal images' scores, and of the maxima of their maps.

    The quantile is the next larger score that occurs, so that at least that share lies below.
    """
    quantile = config.score.threshold_quantile
    if 0 < len(rows) < ENOUGH:
        log.warning(
            "the threshold rests on %d held-out images only: expect false alarms; more training "
            "images, or a larger data.val_fraction, make it firmer",
            len(rows),
        )

    def of(name: str) -> float | None:
        values = [r[name] for r in rows if r[name] is not None]
        return float(np.quantile(values, quantile, method="higher")) if values else None

    return {
        "value": of("pred_score"),
        "quantile": quantile,
        "images": len(rows),
        "pixel_value": of("map_max"),
    }


def write_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = ["key", "category", "defect_type", "gt_label", "pred_score", "pred_label"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def provenance(
    config: RunConfig,
    index: Index,
    trained: Trained,
    units: Sequence[Unit],
    seconds: float,
    here: Session,
) -> dict[str, Any]:
    images = sum(len(unit.samples) for unit in units)
    return {
        "fingerprint": index.fingerprint,
        "checkpoint_step": trained.step,
        "checkpoint_rule": trained.rule,
        "config_digest": digest(config),
        "readout": readout_of(config.score),
        "commit": environment.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "images": images,
        "images_per_second": round(images / seconds, 2),
        "world_size": here.world,
    }
