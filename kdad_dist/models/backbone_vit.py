"""timm's vision transformers as functions from images to tokens."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from kdad_dist.config.methods import VitTeacherConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError
from kdad_dist.models.backbone import check_name, options_of, pretrained_file
from kdad_dist.models.tokens import Colours, Form, TokenNet, Tokens, check_layers
from kdad_dist.models.weights import canonical, load_weights, read_weights


class TimmTokens(TokenNet):
    """A VisionTransformer of timm, which stops after the deepest chosen layer."""

    def __init__(
        self, network: VisionTransformer, form: Form, layers: Sequence[int], colours: Colours
    ) -> None:
        super().__init__(form, layers, colours)
        self.network = network

    def tokens(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        found: Any = self.network.forward_intermediates(
            image,
            indices=[layer - 1 for layer in self.layers],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if self.form.prefix == 0:
            return tuple(found)
        return tuple(torch.cat([prefix, patches], dim=1) for patches, prefix in found)


def build_timm_tokens(
    config: VitTeacherConfig, image_size: int, seed: int, colours: Colours | None
) -> TokenNet:
    """The network at this size of image; pretrained positions are interpolated to it.

    Args:
        colours: None: those that its pretrained weights expect.

    Raises:
        ConfigError: timm has no such transformer, or it has no such layer.
        WeightsError: the weights cannot be had, or do not fit.
    """
    name = config.backbone
    check_name(name, takes_folders=True)
    options: dict[str, Any] = {"img_size": image_size, "num_classes": 0}
    if config.weights == "pretrained":
        options |= options_of(pretrained_file(name))
    try:
        with seeded(seed, "teacher"):
            network = timm.create_model(name, **options)
    except TypeError:  # it knows no `img_size`
        network = None
    if not isinstance(network, VisionTransformer):
        raise ConfigError(
            f"{name} is not a vision transformer",
            "choose one such as vit_base_patch16_224.dino, or another method",
        )
    embed: Any = network.patch_embed
    patch = embed.patch_size[0]
    if image_size % patch:
        raise ConfigError(
            f"data.image_size (or data.tile) is {image_size}, and the patches of {name} are "
            f"{patch} pixels wide",
            f"choose a multiple of {patch}",
        )
    check_layers(name, config.layers, len(network.blocks))
    if config.weights not in {"pretrained", "random"}:
        weights = at_grid(network, read_weights(Path(config.weights)))
        load_weights(network, weights, config.weights)
    cfg: Any = timm.get_pretrained_cfg(name)
    form = Form(network.embed_dim, network.num_prefix_tokens, patch, image_size // patch)
    return TimmTokens(network, form, config.layers, colours or Colours(cfg.mean, cfg.std))


def at_grid(network: VisionTransformer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, their positions interpolated to the network's number of patches, as timm does it
    with those that it fetches.
    """
    own: Any = network.pos_embed
    prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    grid: Any = network.patch_embed
    found = dict(weights)
    for key, positions in weights.items():
        if own is None or canonical(key) != "pos_embed" or positions.ndim != own.ndim:
            continue
        patches = positions.shape[1] - prefix
        is_square = patches > 0 and math.isqrt(patches) ** 2 == patches
        if is_square and positions.shape != own.shape:
            found[key] = resample_abs_pos_embed(
                positions, list(grid.grid_size), num_prefix_tokens=prefix
            )
    return found
