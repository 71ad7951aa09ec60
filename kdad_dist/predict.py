"""Scoring new images: files, folders or patterns, without ground truth.

Writes `predictions.csv`, and for each image its anomaly map (16-bit PNG or npy), an overlay, and,
at the threshold of `metrics.json`, a binary mask and the boxes of its regions. Overlay, mask and
boxes have the size of the image itself, the map has that of the network's input.
"""

import csv
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from kdad_dist.config import RunConfig
from kdad_dist.data.image import EXTENSIONS, decode_image, read_file
from kdad_dist.data.loader import to_float
from kdad_dist.data.reader import Fit
from kdad_dist.errors import DataError, UsageError
from kdad_dist.methods.readout import Detector, readout_of
from kdad_dist.pictures import heat, save_png16
from kdad_dist.runtime import files, session
from kdad_dist.runtime.deal import cut, work
from kdad_dist.runtime.output import filled, write
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.restore import Trained, load_standard, restore
from kdad_dist.runtime.rundir import data_fact, metrics_file, other_shards
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.together import shared

SUFFIXES = frozenset(f".{ext}" for ext in EXTENSIONS.values()) | {".jpeg", ".tiff"}
log = logging.getLogger(__name__)
BOX_COLOUR = (255, 255, 255)
TABLE = "predictions.csv"
FOLDERS = ("maps", "overlays", "masks")
COLUMNS = ["file", "pred_score", "pred_label", "boxes", "map", "overlay", "mask"]


@dataclass(frozen=True)
class Predictor:
    """Scores a unit of image files and writes their pictures."""

    config: RunConfig
    detector: Detector
    fit: Fit
    device: torch.device
    threshold: dict[str, Any]
    out: Path
    names: dict[Path, str]

    def __call__(self, paths: Sequence[Path]) -> list[dict[str, Any]]:
        originals = [decode_image(read(path), str(path)) for path in paths]
        pixels = torch.from_numpy(np.stack([self.fit.image(image) for image in originals]))
        prediction = self.detector(to_float(pixels.permute(0, 3, 1, 2), self.device))
        assert prediction.pred_score is not None
        scores = prediction.pred_score.tolist()
        maps = prediction.anomaly_map
        host = [None] * len(paths) if maps is None else list(maps.cpu().numpy())
        return [
            self.row(path, image, score) | self.pictures(path, image, anomaly_map)
            for path, image, score, anomaly_map in zip(paths, originals, scores, host, strict=True)
        ]

    def row(self, path: Path, image: NDArray[np.uint8], score: float) -> dict[str, Any]:
        limit = self.threshold["value"]
        label = None if limit is None else int(score > limit)
        return {"file": str(path), "pred_score": score, "pred_label": label}

    def pictures(
        self, path: Path, image: NDArray[np.uint8], anomaly_map: NDArray[np.float32] | None
    ) -> dict[str, Any]:
        """Writes what there is to see of one image; the names of the files, and the boxes."""
        if anomaly_map is None:
            return {}
        name, limit = self.names[path], self.threshold["pixel_value"]
        as_npy = self.config.score.save_maps == "npy"
        map_file = self.out / "maps" / f"{name}.{'npy' if as_npy else 'png'}"
        if as_npy:
            np.save(map_file, anomaly_map)
        else:
            save_png16(map_file, anomaly_map)
        full = enlarge(anomaly_map, image.shape[0], image.shape[1])
        picture = heat(Image.fromarray(image), full / max(limit or full.max(), 1e-12) / 2)
        written: dict[str, Any] = {"map": map_file.name, "overlay": f"{name}.jpg"}
        if limit is not None:
            mask = full > limit
            boxes = boxes_of(mask)
            draw = ImageDraw.Draw(picture)
            for left, top, right, bottom in boxes:
                draw.rectangle((left, top, right - 1, bottom - 1), outline=BOX_COLOUR, width=2)
            Image.fromarray(mask.astype(np.uint8) * 255).save(self.out / "masks" / f"{name}.png")
            written |= {"mask": f"{name}.png", "boxes": json.dumps(boxes)}
        picture.save(self.out / "overlays" / written["overlay"], quality=92)
        return written


def predict(config: RunConfig, patterns: Sequence[str], out: Path | None = None) -> Path:
    """Scores the images of files, folders and patterns with the detector of a run.

    Args:
        out: where to write; `predictions/` below the run where not given.

    Returns:
        The CSV file with one line per image.

    Raises:
        DataError: there is no such image, one cannot be decoded, or `out` holds something else or
            cannot be written.
        UsageError: the configuration names other shards than the run's.
    """
    if other_shards(config):
        raise UsageError(
            "new images are judged by the threshold of the run's own data, not of other shards",
            "leave out --shards or --images",
        )
    paths = find_images(patterns)
    out = (out or config.directory / "predictions").resolve()
    with session.start() as here:
        shared(lambda: refuse_foreign(out) if here.is_main else None)
        with filled(out, here) as partial:
            trained = restore(config)
            method = trained.method.to(here.device, memory_format=torch.channels_last)  # pyright: ignore
            resize = shared(lambda: data_fact(config, "resize"))
            threshold = shared(lambda: read_threshold(config, trained))
            predictor = Predictor(
                config,
                Detector(method, config.score, shared(lambda: load_standard(config))),
                Fit(config.data.image_size, None, resize),
                here.device,
                threshold,
                partial,
                unique_names(paths),
            )
            write(partial, lambda: run_units(predictor, cut(paths, config.score.batch_size), here))
            write(partial, lambda: write_table(partial) if here.is_main else None)
    return out / TABLE


def run_units(predictor: Predictor, units: Sequence[Sequence[Path]], here: Session) -> None:
    """Scores this process's share and writes it down; talks to no other process."""
    for folder in FOLDERS:
        (predictor.out / folder).mkdir(exist_ok=True)
    rows = []
    images = sum(map(len, units[here.rank :: here.world]))
    with progress("scoring", images, "images", visible=here.is_main) as bar:
        for number, found in work(units, predictor, here):
            rows += [{"order": [number, i], **row} for i, row in enumerate(found)]
            bar.advance(len(found))
    files.write_json(predictor.out / f"rank_{here.rank:05d}.json", rows)


def find_images(patterns: Iterable[str]) -> list[Path]:
    """The image files that the patterns name, sorted, each once.

    Raises:
        DataError: a pattern names nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            named = {p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()}
        elif path.is_file():
            named = {path}
        else:
            found_by_pattern = glob.glob(pattern, recursive=True)  # noqa: PTH207 - may be absolute
            named = {Path(name) for name in found_by_pattern if Path(name).is_file()}
        if not named:
            raise DataError(
                f"{pattern} is no image, no folder with images, and no pattern that matches any",
                f"images end in {', '.join(sorted(SUFFIXES))}",
            )
        found |= named
    return sorted(found)


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


def read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", "make it readable, or leave it out"
        ) from None


def read_threshold(config: RunConfig, trained: Trained) -> dict[str, Any]:
    """The thresholds that scoring the test split found; unknown where it has not run like this.

    Raises:
        DataError: the file that should say so is damaged.
    """
    path = metrics_file(config)
    missing = f"{path} is not there"
    if path.is_file():
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            limits, origin = metrics["threshold"], metrics["provenance"]
            found = [origin.get(name) for name in ("checkpoint_step", "readout")]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not what `kdad score` writes: {error}",
                f"run `kdad score {config.directory}` again",
            ) from None
        wanted = [trained.step, readout_of(config.score)]
        if found == wanted:
            return limits
        missing = "{} is of step {}, {}; this is step {}, {}".format(path, *found, *wanted)
    log.warning(
        "no threshold, so there are scores but no labels, masks or boxes: %s; for a threshold, run "
        "`kdad score %s` with the same words first",
        missing,
        config.directory,
    )
    return {"value": None, "pixel_value": None}


def enlarge(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear, to the size of the image."""
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def boxes_of(mask: NDArray[np.bool_]) -> list[list[int]]:
    """[left, top, right, bottom] of each 8-connected region, right and bottom exclusive."""
    regions = ndimage.label(mask, np.ones((3, 3)))[0]  # pyright: ignore[reportIndexIssue]
    return [[x.start, y.start, x.stop, y.stop] for y, x in ndimage.find_objects(regions)]


def refuse_foreign(out: Path) -> None:
    """Refuses a place with anything in it that is not ours to replace."""
    if not out.exists():
        return
    ours = {TABLE, *FOLDERS} if (out / TABLE).is_file() else set()
    if not out.is_dir() or {path.name for path in out.iterdir()} - ours:
        raise DataError(
            f"{out} exists and is not a folder of predictions alone, so it is not overwritten",
            "give another folder with --out",
        )


def write_table(partial: Path) -> None:
    """Turns what all processes wrote into one table, in the order of the images."""
    parts = sorted(partial.glob("rank_*.json"))
    rows = [row for part in parts for row in json.loads(part.read_bytes())]
    rows.sort(key=lambda row: row["order"])
    table = partial / TABLE
    with table.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for part in parts:
        part.unlink()
