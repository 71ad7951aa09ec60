"""Scoring new images: files, folders or patterns, without ground truth.

Writes `predictions.csv`, `predictions.json` (what they were made with, and how fast), and for each
image its anomaly map (16-bit PNG or npy), an overlay, its reconstruction where the method gives
one, and, at the threshold of `metrics.json`, a binary mask and the boxes of its regions. The table
names these files by their paths from where it lies itself. Overlay, mask and boxes have the size of
the image itself, map and reconstruction that of the network's input. Where the network saw nothing
of an image, around its centre, there is nothing in any of them: the overlay shows the image itself.
"""

import csv
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.data.new_images import find_images
from kdad_dist.detector import Detector, of_run, pixels
from kdad_dist.errors import DataError
from kdad_dist.pictures import heat, save_png16
from kdad_dist.provenance import Timing, provenance
from kdad_dist.runtime import launch, session
from kdad_dist.runtime.deal import cut, work
from kdad_dist.runtime.output import filled, write
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.rundir import warn_if_unfinished
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.stopping import Stop, StopRequest, forget_requests
from kdad_dist.runtime.together import gathered, shared
from kdad_dist.wording import amount

BOX_COLOUR = (255, 255, 255)
TABLE, FACTS = "predictions.csv", "predictions.json"
FOLDERS = ("maps", "overlays", "reconstructions", "masks")
COLUMNS = [
    *("file", "pred_score", "pred_label", "boxes"),
    *("map", "overlay", "reconstruction", "mask"),
]
CLASS_COLUMNS = ["file", "pred_score", "pred_label", "pred_class"]


class Written(NamedTuple):
    """What became of a unit of images."""

    rows: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Predictor:
    """Scores a unit of image files and writes their pictures."""

    detector: Detector
    out: Path
    names: dict[Path, str]

    @property
    def classes(self) -> list[str] | None:
        """Those that the detector tells apart, if it is a classifier."""
        return self.detector.config.data.classes

    def __call__(self, paths: Sequence[Path]) -> Written:
        originals = [pixels(path, str(path)) for path in paths]
        found = self.detector.predict(originals)
        rows = []
        for i, (path, image) in enumerate(zip(paths, originals, strict=True)):
            label = None if found.pred_label is None else int(found.pred_label[i])
            row = {"file": str(path), "pred_score": found.pred_score[i].item(), "pred_label": label}
            if self.classes and label is not None:
                row["pred_class"] = self.classes[label]
            if found.anomaly_map is not None:
                row |= self.pictures(self.names[path], image, found.anomaly_map[i])
            if found.reconstruction is not None:
                row["reconstruction"] = f"reconstructions/{self.names[path]}.png"
                Image.fromarray(found.reconstruction[i]).save(self.place(row["reconstruction"]))
            rows.append(row)
        return Written(rows, found.seconds)

    def pictures(
        self, name: str, image: NDArray[np.uint8], anomaly_map: NDArray[np.float32]
    ) -> dict[str, Any]:
        """Writes what the map of one image shows; the paths of the files, and the boxes."""
        limit = self.detector.threshold.pixel_value
        as_npy = self.detector.config.score.save_maps == "npy"
        written: dict[str, Any] = {
            "map": f"maps/{name}.{'npy' if as_npy else 'png'}",
            "overlay": f"overlays/{name}.jpg",
        }
        (np.save if as_npy else save_png16)(self.place(written["map"]), anomaly_map)
        seen = self.detector.fit.seen(*image.shape[:2])
        full = laid_over(image, seen, anomaly_map)
        brightest = 2 * max(limit or full.max().item(), 1e-12)
        warm = heat(Image.fromarray(image[seen]), full[seen] / np.float32(brightest))
        picture = Image.fromarray(image)
        picture.paste(warm, (seen[1].start, seen[0].start))
        if limit is not None:
            mask = full > limit
            boxes = boxes_of(mask)
            draw = ImageDraw.Draw(picture)
            for left, top, right, bottom in boxes:
                draw.rectangle((left, top, right - 1, bottom - 1), outline=BOX_COLOUR, width=2)
            written |= {"mask": f"masks/{name}.png", "boxes": json.dumps(boxes)}
            Image.fromarray(mask.astype(np.uint8) * 255).save(self.place(written["mask"]))
        picture.save(self.place(written["overlay"]), quality=92)
        return written

    def place(self, file: str) -> Path:
        path = self.out / file
        path.parent.mkdir(exist_ok=True)
        return path


def predict(
    config: RunConfig, patterns: Sequence[str], out: Path | None, request: StopRequest
) -> tuple[Path, dict[str, Any]]:
    """Scores the images of files, folders and patterns with the detector of a run.

    Args:
        out: where to write; `predictions/` below the run where not given.

    Returns:
        The CSV file with one line per image, and the content of `predictions.json` ({} on other
        processes than the main one).

    Raises:
        DataError: there is no such image, one cannot be decoded, or `out` holds something else or
            cannot be written.
        UsageError: the configuration names other shards than the run's.
        Preempted: it was asked to stop; what it had written is gone again.
    """
    launch.check_precision("score.precision", config.score.precision)
    out = (out or config.directory / "predictions").resolve()
    with session.start(timeout_minutes=config.train.timeout_minutes) as here:
        shared(lambda: refuse_foreign(out) if here.is_main else None)
        # One process looks for all: more images may come meanwhile.
        paths, *_ = gathered(shared(lambda: find_images(patterns, out) if here.is_main else []))
        run = config.directory
        write(run, lambda: forget_requests(run) if here.is_main else None)
        with filled(out, here) as partial:
            stop = Stop(request, partial, "scoring", "begins anew")
            detector = of_run(config, here.device)
            warn_if_unfinished(run, detector.trained.step)
            predictor = Predictor(detector, partial, unique_names(paths))
            units = cut(paths, config.images_per_unit)
            started = time.monotonic()
            write(partial, lambda: run_units(predictor, units, stop, here))
            seconds = time.monotonic() - started
            facts = write(
                partial, lambda: finish(predictor, seconds, here.world) if here.is_main else {}
            )
    return out / TABLE, facts


def run_units(
    predictor: Predictor, units: Sequence[Sequence[Path]], stop: Stop, here: Session
) -> None:
    """Scores this process's share and writes it down; talks to no other process."""
    rows, timings = [], []
    images = sum(map(len, units[here.rank :: here.world]))
    with (
        progress("scoring", images, "images", visible=here.is_main) as bar,
        closing(work(units, predictor, here)) as done,
    ):
        stop.check()
        for number, found in done:
            rows += [{"order": [number, i], **row} for i, row in enumerate(found.rows)]
            timings.append(Timing(len(found.rows), found.seconds))
            bar.advance(len(found.rows))
            here.at(0, f"unit {number}")
            stop.check()
    part = {"rows": rows, "timings": timings}
    files.write_json(part_file(predictor.out, here.rank), part)


def part_file(folder: Path, rank: int) -> Path:
    """What a process did, until all is put together."""
    return folder / f"rank_{rank:05d}.json"


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for the pictures of each image: its own, numbered where two are alike."""
    counts: Counter[str] = Counter()
    names: dict[str, Path] = {}
    for path in paths:
        # 200 bytes and a number stay below the 255 at which most file systems end.
        name = stem = os.fsencode(path.stem)[:200].decode(errors="ignore") or "image"
        while name in names:
            counts[stem] += 1
            name = f"{stem}~{counts[stem] + 1}"
        names[name] = path
    return {path: name for name, path in names.items()}


def laid_over(
    image: NDArray[np.uint8], seen: tuple[slice, slice], values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A map, (h, w) as the image: enlarged bilinearly to what was seen of it, 0 around that."""
    full = np.zeros(image.shape[:2], np.float32)
    height, width = full[seen].shape
    enlarged = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    full[seen] = np.asarray(enlarged)
    return full


def boxes_of(mask: NDArray[np.bool_]) -> list[list[int]]:
    """[left, top, right, bottom] of each 8-connected region, right and bottom exclusive."""
    regions = ndimage.label(mask, np.ones((3, 3)))[0]  # pyright: ignore[reportIndexIssue]
    return [[x.start, y.start, x.stop, y.stop] for y, x in ndimage.find_objects(regions)]


def refuse_foreign(out: Path) -> None:
    """Refuses a place with anything in it that is not ours to replace."""
    if not out.exists():
        return
    ours = {TABLE, FACTS, *FOLDERS} if (out / TABLE).is_file() else set()
    if not out.is_dir() or {path.name for path in out.iterdir()} - ours:
        raise DataError(
            f"{out} exists and is not a folder of predictions alone, so it is not overwritten",
            "give another folder with --out",
        )


def finish(predictor: Predictor, seconds: float, world: int) -> dict[str, Any]:
    """Turns what all processes wrote into one table, in the order of the images, and the facts."""
    partial, detector = predictor.out, predictor.detector
    # By their names: of another machine's files, a folder may not show all yet.
    written = [part_file(partial, rank) for rank in range(world)]
    parts = [json.loads(file.read_bytes()) for file in written]
    rows = in_order(parts, predictor.names)
    table = partial / TABLE
    with table.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        columns = COLUMNS if predictor.classes is None else CLASS_COLUMNS
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    timings = [Timing(*timing) for part in parts for timing in part["timings"]]
    labels = [row["pred_label"] for row in rows]
    if predictor.classes is None:
        anomalous = None if None in labels else sum(labels)
        judged = {"anomalous": anomalous, "threshold": asdict(detector.threshold)}
    else:
        judged = {"classes": {name: labels.count(i) for i, name in enumerate(predictor.classes)}}
    facts = {
        "images": len(rows),
        **judged,
        "provenance": provenance(detector.config, detector.trained, timings, seconds, world),
    }
    files.write_json(partial / FACTS, facts)
    for file in written:
        file.unlink()
    return facts


def in_order(parts: Sequence[dict[str, Any]], paths: Collection[Path]) -> list[dict[str, Any]]:
    """The rows of all parts, in the order of the images.

    Raises:
        DataError: they are not one for each image.
    """
    rows = sorted((row for part in parts for row in part["rows"]), key=lambda row: row["order"])
    if [row["file"] for row in rows] != [str(path) for path in paths]:
        raise DataError(
            f"{amount(len(rows), 'score was', 'scores were')} written, and not one for each of "
            f"{amount(len(paths), 'image')}",
            "see that all processes write to the same disk; then start the same command again",
        )
    return rows
