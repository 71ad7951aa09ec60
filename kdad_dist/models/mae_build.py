"""From a configuration to a masked autoencoder: preset, weights, LoRA, and what is trained."""

import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from kdad_dist.config.methods import LoraMaeConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError, WeightsError
from kdad_dist.models.backbone import pretrained_file
from kdad_dist.models.lora import MARK, add_lora, blocks_of
from kdad_dist.models.mae import PRESETS, Architecture, MaskedAutoencoder
from kdad_dist.models.mae_weights import LoadedMae, load_mae
from kdad_dist.models.masks import visible_count
from kdad_dist.models.weights import read_weights

log = logging.getLogger(__name__)
KEY = "method.weights"
HUB = {
    "mae_vit_base": "vit_base_patch16_224.mae",
    "mae_vit_large": "vit_large_patch16_224.mae",
    "mae_vit_huge": "vit_huge_patch14_224.mae",
}
"""timm's copies of MAE's encoders, by the beginning of the presets that can use them."""
PUBLISHED = re.compile(r"mae_(pretrain|visualize)_vit_(base|large|huge)(_full)?\.pth")
"""Names of MAE's own files; a kind has a folder of its name."""
PUBLISHED_AT = "https://dl.fbaipublicfiles.com/mae"


def build_mae(config: LoraMaeConfig, image_size: int, seed: int) -> MaskedAutoencoder:
    """The network with its weights, adapted and frozen as the configuration says.

    What is drawn at random depends on `seed`; torch's own generators are left as they were.

    Raises:
        ConfigError: there is no such preset or LoRA target, the image is not a whole number of
            patches, the mask ratio leaves nothing to see or to predict, or LoRA would adapt
            nothing but random weights.
        WeightsError: the weights cannot be had, or do not fit.
    """
    architecture = _architecture(config.preset)
    _check_size(image_size, architecture.patch, config.preset)
    _check_ratio(config.mask_ratio, (image_size // architecture.patch) ** 2)
    with seeded(seed, "student"):
        network = MaskedAutoencoder(architecture, image_size, config.activation_checkpointing)
    loaded = _load(network, config)
    if loaded is not None:
        log.info("weights %s", loaded)
    random = {"encoder": loaded is None, "decoder": loaded is None or not loaded.decoder}
    # Blocks that were never trained are trained in full, unless somebody insists.
    whole = [part for part, drawn in random.items() if drawn and not config.freeze_random]
    if config.lora is not None:
        adapted = [part for part in config.lora.parts if part not in whole]
        if not adapted:
            raise _nothing_to_adapt(config.lora.parts)
        add_lora(network, config.lora, seed, adapted)
        for part in whole:
            log.info("the blocks of the %s are random: trained in full, without LoRA", part)
    if config.freeze_non_lora:
        _freeze(network, [part for part in random if part not in whole])
    return network


def _architecture(preset: str) -> Architecture:
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(PRESETS)}"
        raise ConfigError(f"method.preset: there is no {preset!r}", hint)
    return PRESETS[preset]


def _check_size(image_size: int, patch: int, preset: str) -> None:
    if image_size % patch:
        below = image_size // patch * patch
        sizes = [str(size) for size in (below, below + patch) if size]
        raise ConfigError(
            f"data.image_size (or data.tile) is {image_size}, which is no multiple of the {patch} "
            f"pixels of a patch of {preset}",
            f"the nearest sizes that are: {' and '.join(sizes)}",
        )


def _check_ratio(ratio: float, patches: int) -> None:
    visible = visible_count(patches, ratio)
    if not 0 < visible < patches:
        raise ConfigError(
            f"method.mask_ratio {ratio:g} leaves {visible} of {patches} patches visible",
            "choose a ratio that leaves some to see and some to predict, such as 0.75, or a larger "
            "data.image_size (or data.tile)",
        )


def _load(network: MaskedAutoencoder, config: LoraMaeConfig) -> LoadedMae | None:
    """What was loaded; None where all weights are random."""
    if config.weights == "random":
        return None
    if config.weights == "pretrained":
        name = next((hub for start, hub in HUB.items() if config.preset.startswith(start)), None)
        if name is None:
            raise ConfigError(
                f'method.weights="pretrained": nobody has published weights of {config.preset}',
                "name the export of a run that trained it (method.weights=FILE.safetensors), or "
                "train it from the start: method.weights=random, method.lora=null, "
                "method.freeze_non_lora=false",
            )
        path, source = pretrained_file(name, KEY), name
    else:
        path, source = Path(config.weights), config.weights
        _point_to_publisher(path)
    return load_mae(network, read_weights(path, KEY), source, config.patch_embed)


def _point_to_publisher(path: Path) -> None:
    """Raises WeightsError where MAE's own file was named, but is not there."""
    known = PUBLISHED.fullmatch(path.name)
    if known and not path.is_file():
        raise WeightsError(
            f"{KEY}: there is no file {path}",
            f"download it where there is a network: {PUBLISHED_AT}/{known[1]}/{path.name}",
        )


def _nothing_to_adapt(parts: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"method.lora would adapt the {' and the '.join(parts)}, whose weights are random: LoRA "
        "freezes what it adapts, and what was never trained is not worth keeping",
        "train all weights (method.lora=null, method.freeze_non_lora=false), or insist with "
        "method.freeze_random=true",
    )


def _freeze(network: MaskedAutoencoder, parts: list[str]) -> None:
    """Leaves nothing but LoRA to train in the blocks of the parts."""
    for part in parts:
        for name, parameter in blocks_of(network)[part].named_parameters():
            parameter.requires_grad_(MARK in name)
