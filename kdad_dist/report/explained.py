"""What the networks of a classifier's run look at, side by side, for the report."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image

from kdad_dist.report.data import Agreed, Explained, RunFiles
from kdad_dist.report.pictures import data_uri, heated, shrunk

KINDS = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++"}
NETWORKS = {
    "student": "student",
    "teacher": "teacher",
    "beside": "student without teacher",
}
"""Names in the files, and on the page, in its order."""


@dataclass(frozen=True)
class Overlay:
    picture: str
    """A data URI."""
    network: str
    kind: str


@dataclass(frozen=True)
class Sheet:
    """One image under the maps of every network, a line of pictures for each kind of map."""

    key: str
    class_name: str
    image: str
    width: int
    height: int
    told: list[tuple[str, str]]
    """Network, and the class that it takes the image for."""
    lines: list[list[Overlay]]


@dataclass(frozen=True)
class Pair:
    """How far the maps of two networks agree, by kind of map."""

    name: str
    agreed: list[tuple[str, Agreed]]


@dataclass(frozen=True)
class Evidence:
    pairs: list[Pair]
    sheets: list[Sheet]
    networks: list[str]


def evidence(files: RunFiles) -> Evidence | None:
    """Agreement and pictures; None where scoring was not asked for them."""
    agreement = files.metrics.agreement if files.metrics else {}
    if not agreement and not files.explained:
        return None
    pairs = [
        Pair(f"{NETWORKS[one]} and {NETWORKS[other]}", _agreed(agreement, f"{one}_{other}"))
        for one, other in combinations(NETWORKS, 2)
    ]
    folder = files.examples_directory.parent / "explained"
    sheets = [_sheet(entry, folder) for entry in files.explained]
    shown = [name for name in NETWORKS if any(name in entry.maps for entry in files.explained)]
    return Evidence(
        [pair for pair in pairs if pair.agreed], sheets, [NETWORKS[name] for name in shown]
    )


def _agreed(agreement: dict[str, dict[str, Agreed]], pair: str) -> list[tuple[str, Agreed]]:
    by_kind = [(title, agreement.get(kind, {}).get(pair)) for kind, title in KINDS.items()]
    return [(title, agreed) for title, agreed in by_kind if agreed]


def _sheet(entry: Explained, folder: Path) -> Sheet:
    image = shrunk(folder / entry.image)
    lines = [
        [
            _overlay(image, folder / entry.maps[name][kind], name, kind)
            for name in NETWORKS
            if kind in entry.maps.get(name, {})
        ]
        for kind in KINDS
    ]
    told = [(NETWORKS[name], entry.told[name]) for name in NETWORKS if name in entry.told]
    return Sheet(
        entry.key, entry.class_name, data_uri(image), *image.size, told, [x for x in lines if x]
    )


def _overlay(image: Image.Image, file: Path, network: str, kind: str) -> Overlay:
    return Overlay(data_uri(heated(image, file, 1.0, 1.0)), NETWORKS[network], KINDS[kind])
