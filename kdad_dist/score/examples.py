"""What a scoring keeps to look at: anomaly maps, and the worst and best examples."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.pictures import save_png16
from kdad_dist.score.parts import Scored

LONGEST_NAME = 200
"""Bytes; most file systems end at 255."""
EACH = 4
"""Examples of each kind per category."""
CATEGORIES_IN_FULL = 4
"""With more categories than these, one example of each kind is kept of each."""


def write_map(folder: Path, key: str, anomaly_map: NDArray[np.float32], config: RunConfig) -> None:
    """Keeps a map, if `score.save_maps` asks for it, under the image's key."""
    kind = config.score.save_maps
    if kind == "none":
        return
    folder.mkdir(exist_ok=True)
    path = folder / f"{map_name(key)}.{kind}"
    # On the disk before the part that vouches for it: it will not be computed again.
    with path.open("wb") as file:
        if kind == "npy":
            np.save(file, anomaly_map)
        else:
            save_png16(file, anomaly_map)
        file.flush()
        os.fsync(file.fileno())


def map_name(key: str) -> str:
    """A file name for a key, another one for every key, that no disk finds too long."""
    flat = key.replace("/", "__")
    if flat.split("__") == key.split("/") and len(flat.encode()) <= LONGEST_NAME:
        return flat
    start = flat.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def choose(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The defective images of lowest and of highest score, and the good ones of highest score."""
    categories = sorted({row["category"] for row in rows})
    each = EACH if len(categories) <= CATEGORIES_IN_FULL else 1
    for category in categories:
        ranked = sorted(
            (row for row in rows if row["category"] == category), key=lambda r: r["pred_score"]
        )
        defective = [row for row in ranked if row["gt_label"] == 1]
        good = [row for row in ranked if row["gt_label"] == 0]
        lowest = defective[: min(each, (len(defective) + 1) // 2)]
        highest = defective[len(lowest) :][-each:]
        yield from (("miss", row) for row in lowest)
        yield from (("false_alarm", row) for row in good[-each:][::-1])
        yield from (("hit", row) for row in highest[::-1])


def write_examples(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    predict: Callable[[str], Scored],
    load: Callable[[str], NDArray[np.uint8]],
) -> None:
    """Writes image, reconstruction, mask and map of the chosen examples, and `examples.json` that
    lists them; null stands for what there is not.
    """
    folder.mkdir()
    entries = []
    names = ("key", "category", "defect_type", "gt_label", "pred_score", "pred_label")
    for number, (kind, row) in enumerate(choose(rows)):
        outcome = predict(row["key"])
        if outcome.anomaly_map is None:
            continue
        stem = f"{number:04d}"
        Image.fromarray(load(row["key"])).save(folder / f"{stem}_image.png")
        reconstruction = None
        if outcome.reconstruction is not None:
            reconstruction = f"{stem}_reconstruction.png"
            Image.fromarray(outcome.reconstruction).save(folder / reconstruction)
        mask = None
        if outcome.gt_mask is not None and outcome.gt_mask.any():
            mask = f"{stem}_mask.png"
            Image.fromarray(outcome.gt_mask.astype(np.uint8) * 255).save(folder / mask)
        scale = save_png16(folder / f"{stem}_map.png", outcome.anomaly_map)
        entries.append(
            {name: row[name] for name in names}
            | {"kind": kind, "image": f"{stem}_image.png", "reconstruction": reconstruction}
            | {"mask": mask, "map": f"{stem}_map.png", "map_max": scale}
        )
    files.write_json(folder / "examples.json", entries)
