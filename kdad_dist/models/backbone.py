"""Feature backbones: any timm network, as a function from images to the maps of chosen layers."""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kdad_dist.config.methods import TeacherConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError, WeightsError
from kdad_dist.models.dropout import RowDropout
from kdad_dist.models.weights import canonical, fetch, load_weights, local_file, read_weights
from kdad_dist.types import Features

Role = Literal["teacher", "student"]


class Level(NamedTuple):
    """A place in a network, by the shape of the map that is there."""

    channels: int
    stride: int
    """Pixels of the image per position, in each direction."""


class FeatureNet(nn.Module):
    """A network cut off after its deepest chosen layer; every trainable parameter has a gradient.

    Args:
        network: of timm, made with `features_only`.
        mean, std: of the images that its pretrained weights expect, per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.channels_last_maps = getattr(network, "output_fmt", "NCHW") == "NHWC"
        # An empty batch breaks the reshapes of transformers, so a blank image stands in for it; not
        # where BatchNorm would count that image, but networks with BatchNorm are convolutions.
        self.takes_empty = any(isinstance(m, _BatchNorm) for m in network.modules())
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def levels(self) -> list[Level]:
        """Every layer that could be chosen, shallow to deep."""
        info: Any = self.network.feature_info
        return [Level(layer["num_chs"], layer["reduction"]) for layer in info.info]

    @property
    def chosen_levels(self) -> list[Level]:
        info: Any = self.network.feature_info
        return [Level(*shape) for shape in zip(info.channels(), info.reduction(), strict=True)]

    def normalize(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] with the mean and deviation that the pretrained weights expect."""
        return (image - self.mean) / self.std

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        """The chosen layers' maps, shallow to deep, each (b, c, h, w). `b` may be 0."""
        if image.shape[0] == 0 and not self.takes_empty:
            one = image.new_zeros(1, *image.shape[1:])
            return tuple(feature[:0] for feature in self.forward(one))
        maps = self.network(image)
        return (
            tuple(m.permute(0, 3, 1, 2) for m in maps) if self.channels_last_maps else tuple(maps)
        )


def build_teacher(config: TeacherConfig, seed: int) -> FeatureNet:
    """The frozen network, in eval mode.

    Raises:
        ConfigError: there is no such backbone or layer.
        WeightsError: the weights cannot be had, or do not fit.
    """
    teacher = build_backbone(config.backbone, config.weights, config.layers, seed, "teacher")
    return teacher.eval().requires_grad_(False)


def build_student(config: TeacherConfig, seed: int) -> FeatureNet:
    """A network like the teacher, with random weights that differ from a random teacher's.

    Raises:
        As `build_backbone` and `drop_by_image`.
    """
    student = build_backbone(config.backbone, "random", config.layers, seed, "student")
    drop_by_image(student, config.backbone)
    return student


def drop_by_image(network: nn.Module, name: str) -> None:
    """Has a network of timm drop its branches, in training, by the images' own seeds.

    Raises:
        ConfigError: it also drops values by torch's generator, which draws for a batch as a whole.
    """
    for path, module in list(network.named_modules()):
        if isinstance(module, DropPath):
            network.set_submodule(path, RowDropout(module.drop_prob, whole=True))
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "drop_rate", 0)
        if rate:
            raise ConfigError(
                f"{name} cannot be trained here: its {type(module).__name__} drops values by "
                "numbers that torch draws for a batch as a whole, so that a training would depend "
                "on the number of processes and could not be resumed exactly",
                "choose a network without dropout, such as resnet18.tv_in1k or a Swin transformer",
            )


def build_backbone(
    name: str, weights: str, layers: Sequence[int], seed: int, role: Role = "teacher"
) -> FeatureNet:
    """A trainable feature network in channels-last memory format.

    Args:
        name: timm's, with or without the tag of its pretrained weights ("resnet18.tv_in1k").
        weights: "pretrained", "random" or a file.
        layers: timm's `out_indices`, ascending.
        seed: with `role`, decides random weights; torch's own generators are left as they were.

    Raises:
        ConfigError: there is no such backbone or layer.
        WeightsError: the weights cannot be had, or do not fit.
    """
    check_name(name)
    if list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"method.teacher.layers is {list(layers)}",
            "name each layer once, from shallow to deep",
        )
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    file = pretrained_file(name) if weights == "pretrained" else None
    with seeded(seed, role):
        network = _create(name, layers, file)
    if weights not in {"pretrained", "random"}:
        tensors = read_weights(Path(weights))
        load_weights(network, tensors, weights, layer_of=layer_of(network))
    _freeze_unused(network, cfg.input_size)
    net = FeatureNet(network, cfg.mean, cfg.std)
    return net.to(memory_format=torch.channels_last)


def layer_of(network: Any) -> dict[str, int]:
    """Of which chosen layer each tensor is, by key: the first that is computed with it.

    Nothing of networks that timm cuts off in another way than by leaving modules out.
    """
    info = network.feature_info
    ends = dict(zip(map(canonical, info.module_name()), info.out_indices, strict=True))
    found, since = {}, []
    for name, module in network.named_children():
        since += [f"{name}.{key}" for key in module.state_dict()]
        if (end := ends.get(canonical(name))) is not None:
            found |= dict.fromkeys(since, end)
            since = []
    return found


def check_name(
    name: str, key: str = "method.teacher.backbone", takes_folders: bool = False
) -> None:
    """Raises ConfigError where timm has no such network, or no such weights of it.

    Args:
        takes_folders: whether a folder could be meant instead.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        if not takes_folders and ("/" in name or Path(name).exists()):
            hint = (
                "write a name of timm's, such as resnet18.tv_in1k; a folder or an id of the hub is "
                f"for vitkd, and a file of weights for {key.replace('backbone', 'weights')}"
            )
        nor = ", and there is no such folder" if takes_folders else ""
        raise ConfigError(f"{key}: timm has no {name!r}{nor}", hint)
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ConfigError(
            f"{key}: timm has no weights {tag!r} of {architecture}",
            f"use one of {', '.join(tags)}" if tags else f"write {architecture!r}",
        )


def _create(name: str, layers: Sequence[int], file: Path | None) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    # Transformers are built for one input size unless told otherwise; others refuse the option.
    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(layers)}
    if cfg is not None and cfg.fixed_input_size:
        options["dynamic_img_size"] = True
    options |= options_of(file)
    try:
        return timm.create_model(name, **options)
    except (IndexError, AssertionError) as error:
        raise ConfigError(
            f"method.teacher.layers is {list(layers)}, but {name} has the layers {_layers(name)}",
            "name layers that exist",
        ) from error
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name} cannot be used as a backbone: {str(error).splitlines()[0]}",
            "choose a network that gives feature maps at any image size, such as resnet18.tv_in1k",
        ) from error


def options_of(file: Path | None) -> dict[str, Any]:
    """What has timm's `create_model` take pretrained weights from a file; nothing without one."""
    if file is None:
        return {}
    # custom_load: where weights were first published as .npz; the hub has them converted.
    overlay = {"file": str(file), "custom_load": False}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


@torch.enable_grad()  # a program may load a run where it has switched gradients off
def _freeze_unused(network: nn.Module, input_size: tuple[int, ...]) -> None:
    """Freezes what lies deeper than the deepest layer, which a few families of timm keep.

    DDP waits for the gradient of every trainable parameter. Found without computing anything: on
    the meta device.
    """
    shadow = copy.deepcopy(network).to("meta")
    maps = shadow(torch.zeros(2, *input_size, device="meta"))
    torch.stack([m.sum() for m in maps]).sum().backward()
    for parameter, twin in zip(network.parameters(), shadow.parameters(), strict=True):
        parameter.requires_grad_(twin.grad is not None)


def _layers(name: str) -> str:
    with torch.device("meta"):
        network: Any = timm.create_model(name, features_only=True)
    modules = [info["module"] for info in network.feature_info.info]
    return ", ".join(f"{index} ({module})" for index, module in enumerate(modules))


def pretrained_file(name: str, key: str = "method.teacher.weights", unfrozen: str = "") -> Path:
    """The hub's file of a timm model's pretrained weights.

    Args:
        key: of the configuration, which could name a local file instead.
        unfrozen: as `local_file`.

    Raises:
        WeightsError: there is none, or it is neither cached nor reachable.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        remedy = local_file(key, unfrozen)
        raise WeightsError(f"timm has no pretrained weights of {name} on the hub", remedy)
    return fetch(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors", key, unfrozen)
