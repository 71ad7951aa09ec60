"""What classifiers look at, compared while a test set is scored: a student, its teacher, and a
third one beside them, such as the student trained without a teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdad_dist import files
from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.config.run import RunConfig
from kdad_dist.data.pixels import stacked
from kdad_dist.methods.cam import evidence, refuse_flat
from kdad_dist.metrics.agreement import Agreement, agreement, mean_agreement
from kdad_dist.models.backbone_classifier import Classifier, build_known
from kdad_dist.pictures import save_png16
from kdad_dist.runtime.classifiers import choose_checkpoints, open_run
from kdad_dist.runtime.restore import Trained
from kdad_dist.runtime.together import shared
from kdad_dist.score.parts import Compared, Row

MOST = 12
"""Classes of which an image is shown."""
Pixels = NDArray[np.uint8]


class Seen(NamedTuple):
    """One image through the eyes of every network."""

    maps: dict[str, dict[str, NDArray[np.float32]]]
    """By network and kind: (s, s), in [0, 1]."""
    told: dict[str, int]
    """By network, the class that it takes the image for."""


@dataclass(frozen=True)
class Explainer:
    """Networks of the same classes, by what they are: student, teacher, beside."""

    networks: dict[str, Classifier]
    device: torch.device

    def __call__(self, images: Sequence[Pixels], labels: Sequence[int]) -> list[Seen]:
        """What speaks for the true class of each image (s, s, 3)."""
        pixels = stacked(images, self.device)
        label = torch.tensor(labels, device=self.device)
        found = {name: evidence(net, pixels, label) for name, net in self.networks.items()}

        def seen(place: int) -> Seen:
            maps = {
                name: {kind: drawn[place].cpu().numpy() for kind, drawn in said.maps.items()}
                for name, said in found.items()
            }
            told = {name: int(said.logits[place].argmax()) for name, said in found.items()}
            return Seen(maps, told)

        return [seen(place) for place in range(len(images))]


def build_explainer(config: RunConfig, trained: Trained, device: torch.device) -> Explainer | None:
    """The networks of a run that are compared; None where that is not asked for. Collective.

    Raises:
        ConfigError: one of them has no feature map, or tells other classes apart.
        WeightsError, CheckpointError: the one beside them cannot be had.
    """
    method, classes, size = config.method, config.data.classes, config.data.image_size
    if not isinstance(method, ClasskdConfig) or classes is None or not method.explain:
        return None
    networks: dict[str, Any] = {"student": trained.method.network}
    if trained.method.teacher is not None:
        networks["teacher"] = trained.method.teacher
    opened = partial(open_run, sources=choose_checkpoints(method.beside))

    def build() -> Explainer:
        if method.beside is not None:
            beside = build_known(method.beside, classes, size, opened, "method.beside")
            networks["beside"] = beside.to(device, memory_format=torch.channels_last)  # pyright: ignore
        for name, network in networks.items():
            refuse_flat(name, network, torch.zeros(1, 3, size, size, device=device))
        return Explainer(networks, device)

    return shared(build)


def compared(seen: Seen) -> Compared:
    """How far each two networks look at the same in an image."""
    pairs = list(combinations(seen.maps, 2))
    kinds = seen.maps["student"]
    return {
        kind: {f"{a}_{b}": agreement(seen.maps[a][kind], seen.maps[b][kind]) for a, b in pairs}
        for kind in kinds
    }


def mean_over(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By kind of map and pair of networks, the means over the images of a test set."""
    first = rows[0]["agreement"]

    def of(kind: str, pair: str) -> dict[str, Any]:
        found = [row["agreement"][kind][pair] for row in rows]
        return mean_agreement(None if one is None else Agreement(*one) for one in found)

    return {kind: {pair: of(kind, pair) for pair in pairs} for kind, pairs in first.items()}


def write_explained(
    folder: Path,
    classes: Sequence[str],
    rows: Sequence[Row],
    explainer: Explainer,
    load: Callable[[str], Pixels],
) -> None:
    """Writes the first test image of each class under the maps of every network, and
    `explained.json` that lists them.
    """
    folder.mkdir()
    first = {row["gt_label"]: row for row in reversed(rows)}
    entries = []
    for label in sorted(first)[:MOST]:
        key, stem = first[label]["key"], f"{label:04d}"
        image = load(key)
        [seen] = explainer([image], [label])
        Image.fromarray(image).save(folder / f"{stem}_image.png")
        names = {
            name: {kind: f"{stem}_{name}_{kind}.png" for kind in maps}
            for name, maps in seen.maps.items()
        }
        for name, maps in seen.maps.items():
            for kind, drawn in maps.items():
                save_png16(folder / names[name][kind], drawn)
        entries.append(
            {"key": key, "class_name": classes[label], "image": f"{stem}_image.png"}
            | {"told": {name: classes[place] for name, place in seen.told.items()}, "maps": names}
        )
    files.write_json(folder / "explained.json", entries)
