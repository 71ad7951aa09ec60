"""The `method` section of a configuration: one dataclass for each method, told apart by `name`."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.config.types import (
    CHECKED,
    Fraction,
    MethodSection,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)


@dataclass(frozen=True, config=CHECKED)
class TeacherConfig:
    backbone: str = "resnet18"
    """Any timm model that gives feature maps, by its timm name."""
    weights: str = "pretrained"
    """"pretrained" (timm's hub), "random" (drawn from `seed`), or a .safetensors, .pth or .pt
    file."""
    layers: Annotated[list[NonNegative], Field(min_length=1)] = field(
        default_factory=lambda: [1, 2, 3]
    )
    """timm `out_indices`, shallow to deep; in a ResNet 1, 2, 3 are layer1, layer2, layer3."""


@dataclass(frozen=True, config=CHECKED)
class StfpmConfig(MethodSection):
    READING, SAME_LOSS = ("combine", "read_layers"), ("cache_teacher",)

    name: Literal["stfpm"] = "stfpm"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    normalize: bool = True
    """Apply the teacher's mean and standard deviation to the images."""
    combine: Literal["product", "sum", "sum_per_area"] = "product"
    """How the layers' maps become one: their product (official), their sum, or their sum after
    division by each layer's number of positions (notebook)."""
    read_layers: list[NonNegative] | None = None
    """Layers whose maps are read, of those that are trained; all of them where not given."""
    cache_teacher: bool = False
    """Compute the teacher's features once, before training, and keep them in a file."""

    def __post_init__(self) -> None:
        if self.read_layers is not None and not set(self.read_layers) <= set(self.teacher.layers):
            raise ValueError(f"read_layers must be of teacher.layers, {self.teacher.layers}")


@dataclass(frozen=True, config=CHECKED)
class VitTeacherConfig:
    backbone: str = "vit_base_patch16_224.dino"
    """A vision transformer: of timm by its timm name, of the Hugging Face hub by its id
    (OWNER/NAME), or a folder in the hub's form."""
    weights: str = "pretrained"
    """"pretrained", "random" (drawn from `seed`), or for timm's a .safetensors, .pth or .pt
    file."""
    layers: Annotated[list[Positive], Field(min_length=1)] = field(
        default_factory=lambda: [3, 6, 9, 12]
    )
    """Blocks, counted from 1, after which tokens are read; the student has one block for each."""

    @property
    def of_hub(self) -> bool:
        """Whether transformers knows it, not timm."""
        return "/" in self.backbone or Path(self.backbone).is_dir()


@dataclass(frozen=True, config=CHECKED)
class DepthsConfig(MethodSection):
    """What the methods share whose student learns the values and the direction of features at
    several depths of its teacher.
    """

    name: str
    teacher: TeacherConfig | VitTeacherConfig
    value_weight: NonNegativeFloat = 0.01
    """Of the mean squared difference; 0: the direction alone."""
    direction_weight: NonNegativeFloat = 1.0
    """Of 1 - cosine."""
    score_layers: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Layers whose loss is the score, of those that are trained; where not given, all but the
    shallowest."""
    cache_teacher: bool = False
    """Compute the teacher's features once, before training, and keep them in a file."""

    def __post_init__(self) -> None:
        if not set(self.read) <= set(self.teacher.layers):
            raise ValueError(f"score_layers must be of teacher.layers, {self.teacher.layers}")
        if self.value_weight == self.direction_weight == 0:
            raise ValueError("value_weight and direction_weight are both 0: nothing is trained")

    @property
    def read(self) -> list[int]:
        """The layers whose loss is the score."""
        return self.score_layers or self.teacher.layers[1:] or self.teacher.layers


@dataclass(frozen=True, config=CHECKED)
class MkdTeacherConfig(TeacherConfig):
    backbone: str = "vgg16.tv_in1k"
    layers: Annotated[list[NonNegative], Field(min_length=1)] = field(
        default_factory=lambda: [1, 2, 3, 4]
    )
    """timm `out_indices`; in a VGG with `pool`, 1 to 4 are the pools 2 to 5."""


@dataclass(frozen=True, config=CHECKED)
class MkdConfig(DepthsConfig):
    READING = ("score_layers", "localise", "noise_copies", "noise_deviation", "stretch_maps")
    SAME_LOSS = ("student", "use_bias", "cache_teacher")

    name: Literal["mkd"] = "mkd"
    teacher: MkdTeacherConfig = field(default_factory=MkdTeacherConfig)
    pool: bool | None = None
    """Halve each of the teacher's maps by max-pooling, as a VGG does after each of them; where not
    given, of a VGG."""
    student: Literal["small", "equal", "same"] = "small"
    """A cloner 16 wide, one of the teacher's widths, or the teacher's architecture itself."""
    use_bias: bool = False
    """Whether the cloner's convolutions have biases."""
    normalize: bool = True
    """Apply the teacher's mean and standard deviation to the images."""
    balance: bool = False
    """Also weigh the direction by the factor that makes both terms equal before the first step, on
    the first training images; for equal weights."""
    localise: Literal["none", "gradient", "smoothgrad", "guided"] = "gradient"
    """How anomaly maps are made; "none": there are scores alone, much faster."""
    noise_copies: Positive = 50
    """Noisy copies of an image over which `smoothgrad` averages."""
    noise_deviation: PositiveFloat = 0.05
    """Of the noise of `smoothgrad`; images are in [0, 1]."""
    stretch_maps: bool = False
    """Stretch each map to [0, 1] by itself, cut off at its 99th percentile: maps can then not be
    compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool is None:  # so that a run says what it did
            object.__setattr__(self, "pool", self.teacher.backbone.startswith("vgg"))
        if self.use_bias and self.student == "same":
            raise ValueError("use_bias is of cloners; student=same has its own biases")
        if self.balance and self.value_weight != self.direction_weight:
            raise ValueError(
                "balance makes both terms equal, which value_weight "
                f"{self.value_weight:g} and direction_weight {self.direction_weight:g} would undo; "
                "set both to 1"
            )
        if self.localise == "none" and self.stretch_maps:
            raise ValueError(
                "stretch_maps is of maps, and localise=none makes none; set it to false"
            )

    @property
    def draws_to_read(self) -> bool:
        return self.localise == "smoothgrad"  # the noise


@dataclass(frozen=True, config=CHECKED)
class VitStudentConfig:
    heads: Positive = 8
    mlp: Positive = 512
    """Width of the hidden layer of each block's perceptron."""
    dropout: Fraction = 0.2
    """Of the embedded image, of attention, and in the perceptron, while training."""


@dataclass(frozen=True, config=CHECKED)
class VitkdConfig(DepthsConfig):
    READING, SAME_LOSS = ("score_layers",), ("student", "cache_teacher")

    name: Literal["vitkd"] = "vitkd"
    teacher: VitTeacherConfig = field(default_factory=VitTeacherConfig)
    student: VitStudentConfig = field(default_factory=VitStudentConfig)
    normalize: Literal["teacher", "imagenet", "none"] = "teacher"
    """Whose mean and standard deviation are applied to the images."""


@dataclass(frozen=True, config=CHECKED)
class LoraConfig:
    rank: Positive = 4
    alpha: PositiveFloat = 1.0
    """The update B A x is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of the input of A, while training."""
    targets: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["attn.qkv", "attn.proj"]
    )
    """Linear layers of each block, by name; mlp.fc1 and mlp.fc2 adapt the MLP too."""
    parts: Annotated[list[Literal["encoder", "decoder"]], Field(min_length=1)] = field(
        default_factory=lambda: ["encoder", "decoder"]
    )


@dataclass(frozen=True, config=CHECKED)
class InferenceConfig:
    masks: Annotated[int, Field(ge=2)] = 4
    """Masks M that hide each patch exactly once; L - L/M patches are visible under each."""
    pattern: Literal["stripes", "diagonal", "lattice", "random"] = "diagonal"
    """Which patches are hidden together: columns of patches (the seed's), diagonals, a square
    lattice (M must be a square number), or parts of a permutation drawn from the run's seed."""
    partitions: Positive = 1
    """With `random`: so many partitions, whose error maps are averaged."""
    error: Literal["normalised", "pixel"] = "pixel"
    """Squared error of patches normalised by their own mean and deviation, or of pixel values."""
    map: Literal["pixel", "patch"] = "pixel"
    """Resolution of the error: every pixel, or the mean over each patch."""

    def __post_init__(self) -> None:
        if self.partitions > 1 and self.pattern != "random":
            raise ValueError("several partitions exist only with pattern random")


@dataclass(frozen=True, config=CHECKED)
class LoraMaeConfig(MethodSection):
    READING, COSTS = ("inference",), ("activation_checkpointing",)
    SAME_LOSS = ("weights", "patch_embed", "lora", "freeze_non_lora", "freeze_random")

    name: Literal["loramae"] = "loramae"
    preset: str = "mae_vit_large_patch7"
    """Architecture: mae_vit_{base,large}_patch16, mae_vit_{large,huge}_patch14,
    mae_vit_large_patch7, and for a CPU mae_vit_small_patch7, mae_vit_tiny_patch8."""
    weights: str = "pretrained"
    """"pretrained" (the MAE encoder of timm's hub), "random" (drawn from `seed`), or a file: MAE's
    own (.pth, encoder only or full), timm's ViT, or an export of another run (.safetensors)."""
    patch_embed: Literal["resample", "reinit"] = "resample"
    """What to do with a patch embedding of weights made for another patch size."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that is hidden while training."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and deviation instead of pixel values."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """null: no LoRA; all weights are trained (with freeze_non_lora=false)."""
    freeze_non_lora: bool = True
    """Train only LoRA inside the blocks; the few layers outside of blocks are trained always."""
    freeze_random: bool = False
    """Insist on freezing blocks whose weights were drawn at random. Where the decoder has no
    pretrained weights, it is otherwise trained in full and not adapted by LoRA."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if self.lora is None and self.freeze_random:
            raise ValueError("freeze_random=true without lora freezes nothing")
        if self.lora is None and self.freeze_non_lora:
            raise ValueError("freeze_non_lora=true without lora leaves no block to train")
        if self.weights == "random" and self.freeze_non_lora and not self.freeze_random:
            raise ValueError(
                "weights=random with freeze_non_lora=true would freeze a network that was never "
                "trained; name a weights file, or insist with freeze_random=true"
            )

    @property
    def draws_to_read(self) -> bool:
        return self.inference.pattern == "random"  # the partitions


def _name(section: Any) -> str:
    """The method of a `method` section; one that names none is STFPM."""
    if isinstance(section, dict):
        return section.get("name", "stfpm")
    return getattr(section, "name", "stfpm")


MethodConfig = Annotated[
    Annotated[StfpmConfig, Tag("stfpm")]
    | Annotated[LoraMaeConfig, Tag("loramae")]
    | Annotated[MkdConfig, Tag("mkd")]
    | Annotated[VitkdConfig, Tag("vitkd")]
    | Annotated[ClasskdConfig, Tag("classkd")],
    Discriminator(_name),
]
