"""Classifiers: a timm network without its own last layer, and a head for the classes at hand."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdad_dist.config.classkd import ClassifierConfig, ClassTeacherConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError, WeightsError
from kdad_dist.models.backbone import check_name, drop_by_image, options_of, pretrained_file
from kdad_dist.models.dropout import RowDropout
from kdad_dist.models.weights import MANIFEST, load_weights, read_weights

HIDDEN = 1000
"""Width of the original's head."""
KEY = "method.network"


class Classifier(nn.Module):
    """From images to one logit per class.

    Args:
        encoder: of timm, without a classifier: to vectors, by way of maps.
        head: from the vectors to logits.
        mean, std: of the images that the encoder's pretrained weights expect, per channel.
    """

    mean: Tensor
    std: Tensor
    freeze: str = "none"
    """Of the encoder, as in the configuration."""

    def __init__(
        self, encoder: nn.Module, head: nn.Module, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.channels_last_maps = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        # An empty batch breaks the reshapes of transformers; BatchNorm would count a blank image.
        self.takes_empty = any(isinstance(m, _BatchNorm) for m in encoder.modules())
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """The logits of RGB images in [0, 1]. `b` may be 0."""
        if not self.takes_empty and image.shape[0] == 0:  # not `len`, which is never symbolic
            return self.head(self.encoder(image.new_zeros(1, *image.shape[1:]))[:0])
        return self.head(self.encoder((image - self.mean) / self.std))

    def features(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c _h _w"]:
        """The encoder's last maps."""
        encoder: Any = self.encoder
        maps = encoder.forward_features((image - self.mean) / self.std)
        return maps.permute(0, 3, 1, 2) if self.channels_last_maps else maps

    def classify(self, features: Float[Tensor, "b c _h _w"]) -> Float[Tensor, "b k"]:
        """The logits of what `features` gave."""
        encoder: Any = self.encoder
        maps = features.permute(0, 2, 3, 1) if self.channels_last_maps else features
        return self.head(encoder.forward_head(maps))

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen encoder stays in eval mode: its BatchNorm keeps the statistics it came with."""
        super().train(mode)
        if self.freeze == "all":
            self.encoder.eval()
        return self


@dataclass(frozen=True)
class KnownClassifier:
    """A classifier that was trained here."""

    source: str
    """Where it was found, for messages."""
    backbone: str
    head: str
    classes: list[str]
    tensors: dict[str, Tensor]
    """Of a `Classifier`, by name."""


OpenRun = Callable[[Path], KnownClassifier]
"""Reads the classifier of a run directory, which only higher layers know how to do."""


def build_classifier(
    config: ClassifierConfig, classes: int, image_size: int, seed: int, open_run: OpenRun
) -> Classifier:
    """A network to be trained, in channels-last memory format.

    Raises:
        ConfigError: there is no such backbone, it has no BatchNorm that could be trained alone, or
            dropout that does not follow the images' seeds.
        WeightsError: the weights cannot be had, or do not fit.
    """
    check_name(config.backbone, f"{KEY}.backbone")
    pretrained = None
    if config.weights == "pretrained":
        unfrozen = "" if config.freeze == "none" else f"{KEY}.freeze=none"
        pretrained = pretrained_file(config.backbone, f"{KEY}.weights", unfrozen)
    with seeded(seed, "student"):
        network = assemble(config.backbone, config.head, classes, image_size, pretrained)
    drop_by_image(network.encoder, config.backbone)
    if config.weights not in {"pretrained", "random"}:
        path = Path(config.weights)
        tensors = open_run(path).tensors if path.is_dir() else read_weights(path, f"{KEY}.weights")
        load_weights(network.encoder, encoder_of(tensors), config.weights, f"{KEY}.backbone")
    return frozen(network, config)


def frozen(network: Classifier, config: ClassifierConfig) -> Classifier:
    """The network itself, without gradients for what `freeze` names."""
    network.freeze = config.freeze
    if config.freeze == "none":
        return network
    network.encoder.requires_grad_(False)
    if config.freeze == "all_but_bn":
        norms = [m for m in network.encoder.modules() if isinstance(m, _BatchNorm)]
        if not norms:
            raise ConfigError(
                f"{KEY}.freeze is all_but_bn, and {config.backbone} has no BatchNorm",
                f"set {KEY}.freeze=all, or choose a backbone with BatchNorm, such as a ResNet",
            )
        for norm in norms:
            norm.requires_grad_(True)
    return network


def build_known(
    config: ClassTeacherConfig,
    classes: Sequence[str],
    image_size: int,
    open_run: OpenRun,
    key: str = "method.teacher",
) -> Classifier:
    """The frozen network of another run, in eval mode.

    Args:
        key: of the configuration that names it.

    Raises:
        ConfigError: it tells other classes apart.
        WeightsError: there is none, or it does not say what it is.
    """
    path = Path(config.weights)
    known = open_run(path) if path.is_dir() else read_export(path, f"{key}.weights")
    if known.classes != list(classes):
        raise ConfigError(
            f"{key}.weights: {known.source} tells apart {', '.join(known.classes)}, and the "
            f"student is to tell apart {', '.join(classes)}",
            "set data.classes to those of that run, in its order, or train one of these classes",
        )
    network = assemble(known.backbone, known.head, len(classes), image_size)
    load_weights(network, known.tensors, known.source, f"{key}.weights")
    return network.eval().requires_grad_(False)


def read_export(path: Path, key: str) -> KnownClassifier:
    """The classifier in a file that `kdad export` wrote, which its manifest describes.

    Args:
        key: of the configuration that names the file.

    Raises:
        WeightsError: it is no such file.
    """
    tensors = read_weights(path, key)
    try:
        manifest = json.loads(path.with_name(MANIFEST).read_bytes())
        entry = manifest[path.name]
        network, classes = entry["method"]["network"], list(entry["classes"])
        return KnownClassifier(str(path), network["backbone"], network["head"], classes, tensors)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{path} does not say which classifier it is: {path.with_name(MANIFEST)} is missing, "
            "or not of a run of classkd",
            f"set {key} to the directory of such a run, or to what `kdad export` wrote of it, with "
            "the manifest beside it",
        ) from error


def encoder_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the encoder, where they are of a `Classifier`; else all of them."""
    prefix = "encoder."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return own or tensors


def assemble(
    backbone: str, head: str, classes: int, image_size: int, pretrained: Path | None = None
) -> Classifier:
    """The network with drawn weights, but for those of the encoder in a file of timm's hub.

    Raises:
        ConfigError: the backbone does not turn images of this size into vectors.
    """
    cfg = timm.get_pretrained_cfg(backbone)
    assert cfg is not None
    options: dict[str, Any] = {"num_classes": 0, **options_of(pretrained)}
    # Transformers are built for one input size unless told otherwise; others refuse the option.
    if cfg.fixed_input_size:
        options["dynamic_img_size"] = True
    try:
        encoder = timm.create_model(backbone, **options)
        with torch.no_grad():  # on the meta device, where nothing is computed
            shadow = copy.deepcopy(encoder).to("meta").eval()
            shape = shadow(torch.zeros(2, 3, image_size, image_size, device="meta")).shape
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"{backbone} cannot be used as a classifier of images of {image_size} pixels: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "choose another data.image_size, or a network such as resnet18.tv_in1k",
        ) from error
    network = Classifier(encoder, build_head(head, shape[1], classes), cfg.mean, cfg.std)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def build_head(head: str, width: int, classes: int) -> nn.Module:
    """From vectors of this width to logits."""
    if head == "linear":
        return nn.Linear(width, classes)
    return nn.Sequential(
        nn.Linear(width, HIDDEN),
        RowDropout(0.5),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, classes),
    )
