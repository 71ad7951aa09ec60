"""The parts of a scoring: what each process found of some units, kept until all of them are there.

```
scores.partial/
  work.json         everything that decides the scores
  parts/SHA256      rows, counts and times of some units; the name is the hash of the content
  maps/             where asked for
```

A scoring that was stopped or killed goes on with the units that no sound part holds, on any number
of processes.
"""

import hashlib
import io
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdad_dist import __version__, files
from kdad_dist.config.load import plain
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Sample
from kdad_dist.errors import DataError
from kdad_dist.metrics.agreement import Agreement
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.provenance import Timing
from kdad_dist.runtime import environment
from kdad_dist.runtime.identity import shown_hash
from kdad_dist.runtime.restore import Trained

log = logging.getLogger(__name__)
VERSION = 4
"""Raised when a part holds something else than before."""
VAL, SYNTHETIC, TEST = "val", "synthetic", "test"
WORK, PARTS, MAPS = "work.json", "parts", "maps"
KEPT = (WORK, PARTS, MAPS)
CHOICE = (
    *("category", "normal_class", "classes", "val_fraction"),
    *("image_size", "centre_margin", "tile", "tile_overlap"),
)
"""Keys of `data` that say which images are scored, how large, what of them, and in which pieces."""
Row = dict[str, Any]
Compared = dict[str, dict[str, Agreement | None]]
"""Of one image, by kind of map and pair of networks; None where a map is constant."""


@dataclass(frozen=True)
class Scored:
    """One image's outcome."""

    kind: str
    sample: Sample
    pred_score: float
    anomaly_map: NDArray[np.float32] | None
    reconstruction: NDArray[np.uint8] | None
    gt_mask: NDArray[np.bool_] | None
    pred_label: int | None = None
    """The class that was predicted, where classes are told apart."""
    agreement: Compared | None = None
    """How far networks look at the same, where that was asked for."""


class ScoredUnit(NamedTuple):
    images: list[Scored]
    seconds: float
    """From decoded pixels to maps and scores."""


class Part:
    """What one process found of some units: counts, rows and times, no map and no picture."""

    def __init__(self, config: RunConfig) -> None:
        self.test = Evaluation()
        self.synthetic = Evaluation()
        self.compares = config.score.synthetic
        self.rows: list[Row] = []
        self.timings: list[Timing] = []
        self.began = time.monotonic()

    def add(self, number: int, unit: ScoredUnit) -> None:
        self.timings.append(Timing(len(unit.images), unit.seconds))
        for place, image in enumerate(unit.images):
            if image.pred_label is None:  # else the row says it all
                self.measure(image)
            self.rows.append({"order": [number, place], **row(image)})

    def measure(self, image: Scored) -> None:
        """Held-out images count only where they are compared with synthetic defects."""
        sample, measured = image.sample, (image.pred_score, image.anomaly_map, image.gt_mask)
        if image.kind == TEST:
            assert sample.gt_label is not None
            where = (sample.key, sample.category, sample.defect_type, sample.gt_label)
            self.test.update(*where, *measured)
        elif self.compares and image.kind == VAL:
            self.synthetic.update(sample.key, sample.category, None, 0, *measured)
        elif self.compares:
            key = f"{sample.key} (defect)"
            self.synthetic.update(key, sample.category, SYNTHETIC, 1, *measured)

    def save(self, partial: Path, world: int) -> list[str]:
        """Writes the part, if it holds anything; its name."""
        if not self.rows:
            return []
        seconds = (time.monotonic() - self.began) / world
        said = {"rows": self.rows, "timings": self.timings, "seconds": seconds}
        content = json.dumps(said).encode(), self.test.pack(), self.synthetic.pack()
        file = io.BytesIO()
        np.savez(file, *(np.frombuffer(data, np.uint8) for data in content))
        name = hashlib.sha256(file.getvalue()).hexdigest()
        files.write_bytes(partial / PARTS / name, file.getvalue())
        return [name]


class Stored(NamedTuple):
    """A part that was read back."""

    test: Evaluation
    synthetic: Evaluation
    rows: list[Row]
    timings: list[Timing]
    seconds: float
    """Its share of the time that the scoring took, spread over the processes of then."""


class Kept(NamedTuple):
    """The sound parts of an earlier attempt."""

    names: list[str]
    units: set[int]
    seconds: float


def read(partial: Path, names: Iterable[str]) -> Iterator[Stored]:
    """The parts of these names, one after the other.

    Raises:
        DataError: one is missing or damaged.
    """
    for name in names:
        try:
            content = (partial / PARTS / name).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != name:
            raise _damaged(partial, name)
        try:
            part = unpack(content)
        except (ValueError, LookupError, TypeError, EOFError, OSError, BadZipFile):
            raise _damaged(partial, name) from None
        yield part


def unpack(content: bytes) -> Stored:
    """A part from the bytes of its file; damaged ones raise what numpy, zip and JSON raise."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        said, test, synthetic = (arrays[f"arr_{i}"].tobytes() for i in range(3))
    found = json.loads(said)
    return Stored(
        Evaluation.unpack(test),
        Evaluation.unpack(synthetic),
        found["rows"],
        [Timing(*timing) for timing in found["timings"]],
        found["seconds"],
    )


def _damaged(partial: Path, name: str) -> DataError:
    return DataError(f"{partial / PARTS / name} is damaged", "score again")


def work_of(
    config: RunConfig, fingerprint: str, trained: Trained, others: Iterable[nn.Module]
) -> dict[str, Any]:
    """Everything that decides the scores and the units, by name.

    Args:
        others: networks that the trained one is compared with.
    """
    values, device = plain(config), next(trained.method.parameters()).device
    networks = [network.state_dict() for network in (trained.method, *others)]
    cuda = device.type == "cuda"
    return {
        "version of the parts": VERSION,
        "program": [__version__, environment.commit(), torch.__version__],
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "data": [fingerprint, *(values["data"][name] for name in CHOICE)],
        "checkpoint": [trained.step, *(shown_hash(net, "weights") for net in networks)],
        "seed": config.seed,
        "method": values["method"],
        "score": values["score"],
    }


def kept(partial: Path, work: dict[str, Any]) -> Kept:
    """What an earlier attempt at the same work has left; what is damaged or of other work goes."""
    parts, file = partial / PARTS, partial / WORK
    before = files.read_json(file)
    if before != work:
        if before:
            other = ", ".join(name for name in work if before.get(name) != work[name])
            log.warning("what %s holds is scored anew: it is of another %s", partial, other)
        for folder in (parts, partial / MAPS):
            shutil.rmtree(folder, ignore_errors=True)
        files.write_json(file, work)
    parts.mkdir(exist_ok=True)
    for unfinished in parts.glob(".*"):
        unfinished.unlink()
    names: list[str] = []
    done: set[int] = set()
    seconds = 0.0
    for path in sorted(parts.iterdir()):
        try:
            [part] = read(partial, [path.name])
        except DataError as error:
            log.warning("%s: its images are scored again", error.problem)
            path.unlink()
            continue
        units = {r["order"][0] for r in part.rows}
        if done & units:  # a slow network file system hid the first from who scored the second
            path.unlink()
            continue
        names.append(path.name)
        done |= units
        seconds += part.seconds
    return Kept(names, done, seconds)


def forget(partial: Path) -> None:
    """Removes what only a scoring that is not whole needs."""
    shutil.rmtree(partial / PARTS)
    (partial / WORK).unlink()


def row(image: Scored) -> Row:
    sample, anomaly_map = image.sample, image.anomaly_map
    return {
        "kind": image.kind,
        "key": sample.key,
        "category": sample.category,
        "defect_type": sample.defect_type,
        "class_name": sample.class_name,
        "gt_label": sample.gt_label,
        "pred_score": image.pred_score,
        "pred_label": image.pred_label,
        "agreement": image.agreement,
        "map_max": None if anomaly_map is None else float(anomaly_map.max()),
        "mask_empty": None if image.gt_mask is None else not image.gt_mask.any(),
    }
