"""A trained detector in hand: images in, anomaly maps, scores and labels out; no file is written.

`load` is for programs. `kdad score` runs the same code, with shards or files around it.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from torch import Tensor

from kdad_dist.config.load import load_run
from kdad_dist.config.run import RunConfig
from kdad_dist.data.image import decode_image, read_file, upright_rgb
from kdad_dist.data.pixels import stacked
from kdad_dist.data.reader import Fit
from kdad_dist.errors import DataError, UsageError
from kdad_dist.methods.readout import Readout, Standard, readout_of
from kdad_dist.runtime.restore import Trained, load_standard, restore
from kdad_dist.runtime.rundir import data_fact, metrics_file, other_shards, warn_if_unfinished
from kdad_dist.runtime.together import shared
from kdad_dist.wording import kdad

log = logging.getLogger(__name__)
Picture = str | Path | Image.Image | NDArray[np.uint8]
"""A file, an image of Pillow's, or RGB pixels (h, w, 3)."""
Images = Picture | Sequence[Picture] | Iterator[Picture] | NDArray[np.uint8]
"""One, or a batch: a list, whatever gives one after the other, or an array (b, h, w, 3)."""


@dataclass(frozen=True)
class Predictions:
    """What a detector says of some images, in their order, on the host."""

    pred_score: NDArray[np.float32]
    """(b,); higher is more anomalous. Of a classifier: the probability of the likeliest class."""
    anomaly_map: NDArray[np.float32] | None
    """(b, s, s) at `data.image_size`, smoothed, >= 0; None: the method gives none. Of what
    `Detector.fit.image` makes of an image, which is the part that `fit.seen` names."""
    reconstruction: NDArray[np.uint8] | None
    """(b, s, s, 3), RGB: the images as they should be; None: the method gives none."""
    seconds: float
    """From pixels of the right size to everything above."""
    logits: NDArray[np.float32] | None = None
    """(b, k), of a classifier, in the order of `data.classes`; None: no classes are told apart."""
    pred_label: NDArray[np.bool_] | NDArray[np.int64] | None = None
    """(b,), whether the score is above the run's threshold; None: the run has no threshold. Of a
    classifier: the place of the likeliest class in `data.classes`."""

    @property
    def probabilities(self) -> NDArray[np.float32] | None:
        """(b, k), of a classifier: of each class, in the order of `data.classes`."""
        return None if self.logits is None else softmax(self.logits, axis=1)


@dataclass(frozen=True)
class Threshold:
    """What scoring the test split found; None where it has not run like this."""

    value: float | None = None
    """Of an image's score."""
    pixel_value: float | None = None
    """Of a pixel of the anomaly map."""


@dataclass(frozen=True)
class Detector:
    """A run's detector. It never changes, so several threads may use it at a time."""

    config: RunConfig
    trained: Trained
    readout: Readout
    fit: Fit
    device: torch.device
    threshold: Threshold

    def __repr__(self) -> str:
        """Which run it is of; all that it is made of would fill pages."""
        config, step = self.config, self.trained.step
        made = f"{config.method.name} of {config.directory}, step {step}"
        return f"<{type(self).__name__}: {made}, on {self.device}>"

    def predict(self, images: Images) -> Predictions:
        """Judges images of any size, resized and cut as the run's own are.

        Args:
            images: more than `score.batch_size` (or tiles) go through the network in several parts.

        Raises:
            DataError: there is no image, or one cannot be read or is not RGB pixels of 8 bits.
        """
        pictures = batch_of(images)
        if not pictures:
            raise DataError("there is no image to judge", "give at least one")
        largest = self.config.images_per_unit
        parts = []
        for start in range(0, len(pictures), largest):
            part = enumerate(pictures[start : start + largest], start)
            squares = [self.fit.image(pixels(picture, f"image {i}")) for i, picture in part]
            parts.append(judge(self.readout, squares, self.device))
        joined: dict[str, Any] = {}
        for name in ("pred_score", "anomaly_map", "reconstruction", "logits", "pred_label"):
            arrays = [getattr(part, name) for part in parts]
            joined[name] = None if arrays[0] is None else np.concatenate(arrays)
        if (limit := self.threshold.value) is not None:
            joined["pred_label"] = joined["pred_score"] > limit
        return Predictions(**joined, seconds=sum(part.seconds for part in parts))


def load(
    run: str | Path, overrides: Sequence[str] = (), device: str | torch.device | None = None
) -> Detector:
    """The detector of a run directory, for use inside a program.

    Where `torch.distributed` is running, all processes call this together.

    Args:
        overrides: changes to the run's configuration, as on the command line (`score.reduce=topk`).
        device: the GPU where there is one, else the CPU.

    Raises:
        UsageError: this is no run, or there is no such device.
        CheckpointError: the run holds no sound checkpoint.
        DataError: a file of the run is missing or damaged.
    """
    config = load_run(Path(run), overrides)
    available = torch.cuda.is_available()
    where = torch.device(device or ("cuda" if available else "cpu"))
    if where.type == "cuda" and not available:
        raise UsageError("no GPU can be used here", "leave out `device`, or give device='cpu'")
    detector = of_run(config, where)
    warn_if_unfinished(config.directory, detector.trained.step)
    return detector


def of_run(config: RunConfig, device: torch.device) -> Detector:
    """The detector of a run, judging by the run's own threshold. Collective.

    Raises:
        As `load`.
    """
    if other_shards(config):
        raise UsageError(
            "new images are judged by the threshold of the run's own data, not of other shards",
            "leave out --shards (data.shards)",
        )
    trained = restore(config)
    threshold = shared(
        lambda: Threshold() if config.tells_classes else read_threshold(config, trained)
    )
    standard = shared(lambda: load_standard(config, trained.step))
    return assemble(config, trained, device, threshold, standard)


def assemble(
    config: RunConfig,
    trained: Trained,
    device: torch.device,
    threshold: Threshold | None = None,
    standard: Standard | None = None,
) -> Detector:
    """The detector of a method in hand, which moves to the device. Collective."""
    method = trained.method.to(device, memory_format=torch.channels_last)  # pyright: ignore
    resize = shared(lambda: data_fact(config, "resize"))
    readout = Readout(method, config.score, config.data.tiling, standard)
    fit = Fit(config.data.image_size, None, resize, config.data.centre_margin)
    return Detector(config, trained, readout, fit, device, threshold or Threshold())


def judge(
    readout: Readout, images: Sequence[NDArray[np.uint8]], device: torch.device
) -> Predictions:
    """What the network says of a unit of images (s, s, 3); a label only where it tells classes."""
    started = time.perf_counter()
    said = readout(stacked(images, device))
    assert said.pred_score is not None
    score = said.pred_score.float().cpu().numpy()  # numpy has no bfloat16
    anomaly_map = None if said.anomaly_map is None else said.anomaly_map.cpu().numpy()
    filled = said.reconstruction
    picture = None if filled is None else eight_bits(filled).cpu().numpy()
    logits = None if said.logits is None else said.logits.float().cpu().numpy()
    label = None if logits is None else logits.argmax(1)
    return Predictions(score, anomaly_map, picture, time.perf_counter() - started, logits, label)


def eight_bits(image: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b h w 3"]:
    """Pixels of RGB in [0, 1]."""
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def batch_of(images: Images) -> list[Picture]:
    """The images of a batch, or the one that was given instead of one."""
    if isinstance(images, str | Path | Image.Image) or not isinstance(images, Iterable):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim != 4:
        return [images]
    return list(images)


def pixels(picture: Picture, name: str) -> NDArray[np.uint8]:
    """RGB, (h, w, 3).

    Raises:
        DataError: it cannot be read, or is not RGB pixels of 8 bits.
    """
    if isinstance(picture, str | Path):
        return decode_image(read(Path(picture)), str(picture))
    if isinstance(picture, Image.Image):
        return upright_rgb(picture, name)
    if not (
        isinstance(picture, np.ndarray)
        and picture.dtype == np.uint8
        and picture.ndim == 3
        and picture.shape[2] == 3
        and picture.size
    ):
        kind = f"a {type(picture).__name__}"
        if isinstance(picture, np.ndarray):
            kind = f"an array of {picture.dtype} and shape {picture.shape}"
        raise DataError(
            f"{name} is {kind}", "give RGB pixels as an array of uint8 and shape (h, w, 3)"
        )
    return picture


def read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", "make it readable, or leave it out"
        ) from None


def read_threshold(config: RunConfig, trained: Trained) -> Threshold:
    """The thresholds that scoring the test split found; unknown where it has not run like this.

    Raises:
        DataError: the file that should say so is damaged.
    """
    path = metrics_file(config)
    missing = f"{path} is not there"
    if path.is_file():
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            found = [metrics["provenance"].get(name) for name in ("checkpoint_step", "readout")]
            limits = {field.name: metrics["threshold"][field.name] for field in fields(Threshold)}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not what `kdad score` writes: {error}",
                f"run `{kdad('score', config.directory)}` again",
            ) from None
        wanted = [trained.step, readout_of(config)]
        if found == wanted:
            return Threshold(**limits)
        one, other = ("step {}, {}".format(*values) for values in (found, wanted))
        missing = f"{path} is of {_unlike(one, other)}; this is {_unlike(other, one)}"
    log.warning(
        "no threshold, so there are scores but no labels, masks or boxes: %s; for a threshold, run "
        "`%s` with the same words first",
        missing,
        kdad("score", config.directory),
    )
    return Threshold()


def _unlike(words: str, others: str) -> str:
    """What a reading has that another has not; everything where that is nothing."""
    parts, shared_parts = (re.split(r", (?=[a-z])", text) for text in (words, others))
    return ", ".join(part for part in parts if part not in shared_parts) or words
