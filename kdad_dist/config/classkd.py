"""The `method` section of classifier distillation."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from kdad_dist.config.types import CHECKED, MethodSection, Positive, PositiveFloat


@dataclass(frozen=True, config=CHECKED)
class ClassifierConfig:
    backbone: str = "resnet18.tv_in1k"
    """Any timm classifier, by its timm name; its own last layer is left out."""
    weights: str = "pretrained"
    """Of the backbone: "pretrained" (timm's hub), "random" (drawn from `seed`), a .safetensors,
    .pth or .pt file, or the directory of another run of classkd. The head is always drawn."""
    head: Literal["linear", "original"] = "linear"
    """One linear layer, or the original's: 1000 wide with dropout, BatchNorm and ReLU before it."""
    freeze: Literal["none", "all", "all_but_bn"] = "none"
    """Of the backbone. `all`: only the head is trained, and BatchNorm keeps its statistics.
    `all_but_bn`: the head and BatchNorm are trained."""

    def __post_init__(self) -> None:
        if self.weights == "random" and self.freeze != "none":
            raise ValueError(
                f"weights=random with freeze={self.freeze} would freeze a backbone that was never "
                "trained; name a file, or set freeze=none"
            )


@dataclass(frozen=True, config=CHECKED)
class ClassTeacherConfig:
    weights: str
    """The directory of a run of classkd (its best checkpoint), or the file that `kdad export` wrote
    of one. Backbone, head and classes are those of that run."""


@dataclass(frozen=True, config=CHECKED)
class TurnsConfig:
    period: Positive = 200
    """Steps after which the turns begin anew."""
    discriminator: Positive = 21
    """The first steps of a period; the others are the student's."""

    def __post_init__(self) -> None:
        if self.discriminator >= self.period:
            raise ValueError(f"discriminator must be below period, {self.period}")


@dataclass(frozen=True, config=CHECKED)
class ClasskdConfig(MethodSection):
    READING = ("explain", "beside")

    name: Literal["classkd"] = "classkd"
    network: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The student."""
    teacher: ClassTeacherConfig | None = None
    distill: Literal["none", "hinton", "rkd_distance", "rkd_angle", "discriminator"] = "none"
    """What is learnt of the teacher beside the labels: its softened probabilities, the relations of
    the images of a batch by the distances, or the angles, of its logits, or answers that a second
    network cannot tell from the teacher's."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of `hinton` or `discriminator` in the loss; the rest is cross-entropy."""
    temperature: PositiveFloat = 1.5
    """By which `hinton` and `discriminator` divide the logits."""
    relation_weight: PositiveFloat = 5.0
    """Of the relations, added to cross-entropy."""
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    """Of `discriminator`: which network a step trains."""
    explain: bool = False
    """Whether scoring compares what student, teacher and `beside` look at: Grad-CAM, Grad-CAM++."""
    beside: ClassTeacherConfig | None = None
    """A third classifier to compare with, such as the student trained without a teacher."""
    cache_teacher: bool = False
    """Compute the teacher's logits once, before training, and keep them in a file."""

    def __post_init__(self) -> None:
        if self.distill == "none" and self.teacher is not None:
            raise ValueError("distill=none learns nothing of a teacher; set teacher=null")
        if self.distill != "none" and self.teacher is None:
            raise ValueError(f"distill={self.distill} needs teacher.weights, a trained classifier")
        if self.cache_teacher and self.teacher is None:
            raise ValueError("cache_teacher=true needs a teacher")
        if self.beside is not None and not self.explain:
            raise ValueError(
                "beside is compared with only where explain=true; set explain=true, or name no "
                "such classifier: method.beside=null"
            )
