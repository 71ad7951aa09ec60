"""The configuration of a run: what may stand in a YAML file, with its defaults and its limits.

Nothing here imports torch, so that the command line answers at once, on login nodes too.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.config.data import DataConfig as DataConfig
from kdad_dist.config.methods import (
    LoraMaeConfig,
    MethodConfig,
    MkdConfig,
    StfpmConfig,
)
from kdad_dist.config.types import (
    CHECKED,
    NO,
    FolderName,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)


@dataclass(frozen=True, config=CHECKED)
class OptimConfig:
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: PositiveFloat | None = None
    blr: PositiveFloat | None = None
    """Base learning rate: lr = blr * batch_size / 256. Exactly one of `lr` and `blr` is given."""
    weight_decay: NonNegativeFloat = 0.0
    decay_vectors: bool = True
    """Whether weight decay applies to biases and other one-dimensional parameters; not in MAE."""
    momentum: Fraction = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Of SGD with a momentum: whether it looks ahead by it (Nesterov)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of Adam and AdamW."""
    schedule: Literal["constant", "cosine", "multistep", "exponential"] = "constant"
    warmup_epochs: NonNegativeFloat = 0
    min_lr: NonNegativeFloat = 0.0
    """Where a cosine ends."""
    milestones: list[Positive] = field(default_factory=list)
    """Epochs at which `multistep` multiplies the learning rate by `gamma`."""
    gamma: PositiveFloat = 0.1
    """Factor at each milestone (multistep) or after each epoch (exponential)."""
    clip: PositiveFloat | None = None
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.blr is None):
            raise ValueError(
                "give exactly one of lr and blr; the other is null (optim.blr=null beside optim.lr)"
            )
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("schedule multistep needs milestones, a list of epochs")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name sgd and a momentum above 0")


@dataclass(frozen=True, config=CHECKED)
class TrainConfig:
    epochs: Positive | None = None
    steps: Positive | None = None
    """Length of the training in optimizer steps, instead of `epochs`."""
    batch_size: Positive = 32
    """Images per optimizer step, over all processes."""
    micro_batch_size: Positive | None = None
    """Images per process and forward pass; smaller than its share of a batch: gradients are
    accumulated."""
    precision: Annotated[Literal["no", "bf16", "fp16"], NO] = "no"
    compile: bool = False
    validate_every: Positive = 1
    """Epochs between two measurements of the loss on the held-out normal images."""
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    check_every: Positive = 8
    """Steps that a bad loss or a request to stop may wait before the processes agree on it."""
    max_time: PositiveFloat | None = None
    """Minutes after which the run saves, stops, and asks to be started again (exit code 75)."""
    timeout_minutes: PositiveFloat = 30
    """Minutes for which no process comes any further when a launch is given up; it also says which
    one hangs. For scoring too."""
    init_from: str | None = None
    """A checkpoint's directory, or an exported file, whose weights the student starts from."""
    changed_config: Literal["refuse", "accept"] = "refuse"
    """What to do where the run directory holds a run of another configuration."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps; the other is null")


@dataclass(frozen=True, config=CHECKED)
class CheckpointConfig:
    every_steps: Positive | None = None
    every_minutes: PositiveFloat | None = 10
    keep: Positive = 2
    """How many of the newest to keep; the best on held-out normal images is kept beside them."""
    keep_hours: NonNegativeFloat = 0
    """Checkpoints younger than this stay too, however many they are."""
    asynchronous: bool = False
    """Write in the background, from a copy in the host's memory, while training goes on."""


@dataclass(frozen=True, config=CHECKED)
class ScoreConfig:
    checkpoint: Literal["best", "last"] = "best"
    """"best": lowest loss on held-out normal images. Results of "last" stand in
    `metrics-last.json` and `scores-last/`; status, report and comparison show those of the one that
    is named here."""
    reduce: Literal["max", "topk", "quantile", "mean"] = "max"
    """How an anomaly map becomes the image's score."""
    topk: Positive = 100
    """Pixels that `topk` averages."""
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.995
    """Of the map's pixels, for `quantile`."""
    smooth_sigma: NonNegativeFloat = 4
    """Gaussian smoothing of the anomaly map, in pixels; 0: none."""
    smooth_radius: Positive | None = None
    """Pixels at which the Gaussian is cut off; 4 sigma where not given."""
    opening: bool = False
    """Level peaks of the smoothed map into which a cross of 3 x 3 pixels does not fit."""
    standardise: bool = False
    """Subtract from each position of a map what held-out normal images have there, and divide by
    their deviation."""
    threshold_quantile: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Quantile of the held-out normal images' scores above which an image is called anomalous."""
    batch_size: Positive = 16
    """Images (or tiles of them) that go through the network together. Scores depend on it in the
    last bits, never on the processes."""
    precision: Annotated[Literal["no", "bf16"], NO] = "no"
    synthetic: bool = False
    """Also measure held-out normal images against themselves with synthetic defects: the figure
    to choose by, where something must be chosen."""
    save_maps: Literal["none", "png", "npy"] = "none"


@dataclass(frozen=True, config=CHECKED)
class TrackConfig:
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; "online" is offline as well where there is no key or no network."""
    project: str = "kdad"
    group: str | None = None
    media: bool = False
    """Whether scoring adds its figures, its table and its examples to the W&B run."""
    tensorboard: bool = False


@dataclass(frozen=True, config=CHECKED)
class RunConfig:
    name: FolderName
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    output: str | None = None
    """The run's directory; runs/<name> where not given."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    method: MethodConfig = field(default_factory=StfpmConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        start = self.train.init_from
        if isinstance(self.method, LoraMaeConfig) and start and Path(start).suffix:
            raise ValueError("train.init_from: a file for loramae belongs to method.weights")
        if self.data.tile and isinstance(self.method, MkdConfig) and self.method.stretch_maps:
            raise ValueError(
                "method.stretch_maps stretches the map of each tile by itself, so that tiles "
                "(data.tile) would not fit together; leave out one or the other"
            )
        if self.tells_classes:
            self._check_classes()
        elif self.data.classes:
            raise ValueError(
                f"data.classes: {self.method.name} looks for anomalies and tells no classes apart; "
                "leave it out (data.normal_class names the class that counts as normal)"
            )

    def _check_classes(self) -> None:
        """Raises ValueError where something is asked for that is of anomalies only."""
        wanted = {
            "data.normal_class": self.data.normal_class is not None,
            "data.tile": self.data.tile is not None,
            "score.standardise": self.score.standardise,
            "score.synthetic": self.score.synthetic,
            "score.save_maps": self.score.save_maps != "none",
        }
        if found := [key for key in wanted if wanted[key]]:
            raise ValueError(
                f"{', '.join(found)}: {self.method.name} tells classes of whole images apart, and "
                "knows neither normal images nor anomaly maps; leave it out"
            )

    @property
    def tells_classes(self) -> bool:
        """Whether the method learns from labels; the others learn what normal looks like."""
        return isinstance(self.method, ClasskdConfig)

    @property
    def makes_maps(self) -> bool:
        """Whether an image gets a map beside its score."""
        silent = isinstance(self.method, MkdConfig) and self.method.localise == "none"
        return not (silent or self.tells_classes)

    @property
    def doubt(self) -> str | None:
        """What makes the figures of the run mean little, whatever they are."""
        teacher = None if self.tells_classes else getattr(self.method, "teacher", None)
        if getattr(teacher, "weights", None) != "random":
            return None
        return (
            "the teacher's weights are random (method.teacher.weights): that tries out the "
            "commands; the figures mean nothing on photographs"
        )

    @property
    def directory(self) -> Path:
        return Path(self.output) if self.output else Path("runs") / self.name

    @property
    def images_per_unit(self) -> int:
        """Images that are scored together at most: one, where it has many tiles."""
        return max(1, self.score.batch_size // self.data.tiling.count)
