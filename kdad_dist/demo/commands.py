"""First contact: a generated data set, packed, trained on, scored and reported without network.

The demo types the commands that a user would type, each in a process of its own; nothing in the
rest of the project knows of it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from kdad_dist.config.load import load, override
from kdad_dist.config.methods import StfpmConfig
from kdad_dist.demo.images import CATEGORY, DEFECTS, SIDE, Example, examples
from kdad_dist.errors import KdadError, Preempted, UsageError
from kdad_dist.files import shipped
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.wording import duration
from kdad_dist.wording import kdad as typed

TRAIN, GOOD, DEFECTIVE = 120, 30, 8
"""Sound pieces to train on, sound ones to test on, and test images with each kind of defect."""
PROCESSES = 2
MARKER = "demo.json"
"""Says that a directory is the demo's, and which seed its data were drawn from."""


@dataclass(frozen=True)
class Place:
    """The directories of a demo."""

    root: Path

    @property
    def photos(self) -> Path:
        return self.root / "photos"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher.safetensors"

    @property
    def run(self) -> Path:
        return self.root / "run"


class DemoError(KdadError):
    """One of the demo's commands failed."""


def demo(out: Path, seed: int) -> None:
    """Runs the whole demo in `out`; what an earlier demo of the same seed finished is used again.

    Raises:
        UsageError: `out` holds something else, or a demo of another seed.
        KdadError: one of the commands failed; its own message stands above.
    """
    started = time.monotonic()
    place, recipe = Place(out), load("demo")
    claim(out, seed)
    say(f"1/4  Drawing {TRAIN + GOOD + len(DEFECTS) * DEFECTIVE} photographs of woven cloth")
    data = list(examples(seed, TRAIN, GOOD, DEFECTIVE))
    write_photos(place.photos, data)
    say("2/4  Packing them into shards")
    kdad("pack", place.photos, place.shards, "--size", SIDE)
    say(f"3/4  Training a student on sound cloth only, with {PROCESSES} processes on the CPU")
    # torch is imported here, after the first messages: it takes some seconds.
    from kdad_dist.demo.teacher import write_teacher

    assert isinstance(recipe.method, StfpmConfig)
    train = np.stack([example.image for example in data if example.split == "train"])
    write_teacher(place.teacher, recipe.method.teacher, train)
    kdad("train", "demo", *overrides(place, seed), launch=True, shown=True)
    say("4/4  Scoring, and writing the report")
    kdad("score", place.run, launch=True)
    kdad("report", place.run)
    metrics = json.loads((place.run / "metrics.json").read_text(encoding="utf-8"))
    say(f"\n{table(metrics, z_score(data, recipe.score.smooth_sigma))}\n")
    took = duration(time.monotonic() - started)
    say(f"{took} from the first line to here. {AFTER.format(report=page(place.run))}")


AFTER = """The page with all results, curves and pictures:
  {report}

For photographs of your own (a folder with train/good, and test/good and test/ANY-DEFECT):
  kdad pack my_photos shards/mine
  kdad train stfpm_mvtec data.shards=shards/mine data.category=all name=mine
  kdad score runs/mine
  kdad report runs/mine"""


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def page(run: Path) -> Path:
    return (run / "report.html").resolve()


# --- Steps -------------------------------------------------------------------------------------


def claim(out: Path, seed: int) -> None:
    """Makes `out` the directory of this demo.

    Raises:
        UsageError: it holds something else, or a demo of another seed.
    """
    marker = out / MARKER
    if marker.is_file():
        other = json.loads(marker.read_text(encoding="utf-8"))["seed"]
        if other != seed:
            elsewhere = typed("demo", "--seed", seed, "--out", f"{out}-{seed}")
            raise UsageError(
                f"{out} holds the demo of seed {other}, and {seed} was asked for",
                f"name another directory: {elsewhere}",
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and was not made by kdad demo",
            "name a new directory: kdad demo --out DIR",
        )
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"seed": seed}) + "\n", encoding="utf-8")


def write_photos(folder: Path, data: Sequence[Example]) -> None:
    """The data set as a folder in the layout of MVTec AD, complete or not at all."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    numbers: dict[tuple[str, str], int] = {}
    for example in data:
        place = (example.split, example.defect_type)
        number = numbers[place] = numbers.get(place, -1) + 1
        category = partial / CATEGORY
        save(category / "/".join(place) / f"{number:03}.png", example.image)
        if example.mask is not None:
            mask = np.where(example.mask, 255, 0).astype(np.uint8)
            save(category / "ground_truth" / place[1] / f"{number:03}_mask.png", mask)
    partial.rename(folder)


def save(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def overrides(place: Place, seed: int) -> list[str]:
    """What the recipe `demo` cannot know."""
    values = {
        "data.shards": str(place.shards),
        "output": str(place.run),
        "method.teacher.weights": str(place.teacher),
    }
    return [f"seed={seed}", *(override(key, value) for key, value in values.items())]


def kdad(*words: object, launch: bool = False, shown: bool = False) -> None:
    """Runs `kdad WORDS`; with `launch`, in several processes under `accelerate launch`.

    Its messages are shown as they come, or only where it fails.
    """
    command = [sys.executable]
    if launch:
        command += ["-m", "kdad_dist.runtime.launcher", "--config_file", str(launch_config())]
        command += ["--num_processes", str(PROCESSES)]
    arguments = [str(word) for word in words]
    say(f"     {typed(*arguments)}")
    done = subprocess.run(  # noqa: S603 (our own program)
        [*command, "-m", "kdad_dist", *arguments],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=None if shown else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    if done.stderr:
        say(done.stderr.rstrip())
    if done.returncode == Preempted.exit_code:
        raise Preempted("the demo was asked to stop", "run the same command again to go on")
    raise DemoError(
        f"`kdad {arguments[0]}` of the demo failed (exit code {done.returncode})",
        "its own message stands above; `kdad demo --out DIR` with a new DIR starts afresh",
    )


def launch_config() -> Path:
    """accelerate's file for the CPU."""
    return shipped("launch") / "accelerate" / "cpu.yaml"


def environment() -> dict[str, str]:
    """Of every command: the CPU, its cores shared out, and nothing outside the directory."""
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    return os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(min(threads, 4)),
        "HF_HUB_OFFLINE": "1",
    }


# --- The yardstick -----------------------------------------------------------------------------


def z_score(data: Sequence[Example], sigma: float) -> dict[str, Any]:
    """The metrics of the plain baseline: how many deviations a pixel lies from its training mean.

    The largest of its three channels, smoothed as the detector's maps are; an image's score is its
    largest pixel.
    """
    train = np.stack([example.image for example in data if example.split == "train"]).astype(float)
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    evaluation = Evaluation()
    for number, example in enumerate(data):
        if example.split == "train":
            continue
        distance = (np.abs(example.image - mean) / deviation).max(-1)
        anomaly_map = ndimage.gaussian_filter(distance, sigma)
        kind = None if example.mask is None else example.defect_type
        evaluation.update(
            str(number),
            CATEGORY,
            kind,
            int(kind is not None),
            float(anomaly_map.max()),
            anomaly_map,
            example.mask,
        )
    return evaluation.report()


def table(ours: dict[str, Any], baseline: dict[str, Any]) -> str:
    """The detector's metrics with the baseline's beside them, for each kind of defect and all."""
    mine, other = ours["categories"][CATEGORY], baseline["categories"][CATEGORY]
    lines = [
        f"{'':<16}{'image AUROC':>13}{'z-score':>9}{'pixel AUROC':>14}{'z-score':>9}{'AUPRO':>9}"
    ]
    lines.append("-" * len(lines[0]))
    kinds = [
        (f"  {kind}", mine["defect_types"][kind], other["defect_types"][kind]) for kind in DEFECTS
    ]
    for name, a, b in [(CATEGORY, mine, other), *kinds]:
        lines.append(
            f"{name:<16}{a['image_auroc']:>13.3f}{b['image_auroc']:>9.3f}"
            f"{a['pixel_auroc']:>14.3f}{b['pixel_auroc']:>9.3f}{a['pixel_aupro']:>9.3f}"
        )
    return "\n".join(lines)
