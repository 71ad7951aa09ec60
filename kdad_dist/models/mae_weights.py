"""Weights made for a masked autoencoder, or for a ViT, of perhaps another grid or patch size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from kdad_dist.errors import WeightsError
from kdad_dist.models.lora import MARK
from kdad_dist.models.mae import PRESETS, MaskedAutoencoder
from kdad_dist.models.weights import by_name, canonical, listed

DECODER = ("decoder_", "mask_token")
"""How the keys begin that an encoder's weights lack."""
BLOCKS = ("blocks_", "decoder_blocks_")


@dataclass
class LoadedMae:
    """What became of each tensor of the network, and of those that it has no place for."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    """Keys, and from what to what."""
    fresh: list[str] = field(default_factory=list)
    """Drawn at random, or for a position table computed anew."""
    skipped: list[str] = field(default_factory=list)
    """Keys of the file."""
    decoder: bool = False
    """Whether all blocks of the decoder were among the weights."""

    def __str__(self) -> str:
        words = [f"{self.source}: {len(self.loaded)} tensors taken as they are"]
        resized = [f"{key} ({how})" for key, how in self.resized.items()]
        for what, keys in (
            ("resized", resized),
            ("not in the file or of another size, made anew", together(self.fresh)),
            ("in the file but of no use here", together(self.skipped)),
        ):
            if keys:
                words.append(f"{what}: {', '.join(keys)}")
        return "; ".join(words)


def load_mae(
    network: MaskedAutoencoder,
    tensors: dict[str, Tensor],
    source: str,
    patch_embed: Literal["resample", "reinit"],
) -> LoadedMae:
    """Fills the network, before LoRA is added, with weights of an encoder, or of a decoder too.

    Positions of another grid are interpolated (the decoder's computed anew), a patch embedding of
    another size is resampled or, with "reinit", left at random but for its bias; a prediction head
    of another patch size is left at random.

    Raises:
        WeightsError: a tensor of the encoder is missing, or any has another shape, is not finite,
            could be one of several, or belongs to a block that the network lacks; the message
            lists them.
    """
    own = network.state_dict()
    given = by_name(tensors, {canonical(key) for key in own}, source)
    report, faults, values = LoadedMae(source), [], {}
    for key, place in own.items():
        tensor = given.get(canonical(key))
        if tensor is None:
            if key.startswith(DECODER):
                report.fresh.append(key)
            else:
                faults.append(f"{key}: missing")
        elif not tensor.isfinite().all():
            faults.append(f"{key}: holds NaN or infinity")
        elif tensor.shape == place.shape:
            values[key] = tensor
            report.loaded.append(key)
        elif not _same_but_for_size(key, tensor, place):
            faults.append(f"{key}: shape {tuple(tensor.shape)}, needed {tuple(place.shape)}")
        elif key == "pos_embed":
            values[key] = resample_abs_pos_embed(tensor, [network.grid] * 2, antialias=False)
            report.resized[key] = f"grid {_grid(tensor)} to {network.grid}"
        elif key == "patch_embed.proj.weight" and patch_embed == "resample":
            values[key] = resample_patch_embed(tensor, [network.patch] * 2)
            report.resized[key] = f"patch {tensor.shape[-1]} to {network.patch}"
        else:
            report.fresh.append(key)
    known = {canonical(key) for key in own}
    report.skipped = [key for key in tensors if canonical(key) not in known]
    faults += _misplaced(report)
    if faults:
        raise _misfit(network, given, source, faults)
    with torch.no_grad():
        for key, tensor in values.items():
            own[key].copy_(tensor)
    report.decoder = not any(key.startswith("decoder_blocks.") for key in report.fresh)
    return report


def _same_but_for_size(key: str, tensor: Tensor, place: Tensor) -> bool:
    """Whether the two differ in nothing but the grid or the patch size."""
    match key:
        case "pos_embed" | "decoder_pos_embed":
            table = tensor.dim() == 3 and tensor.shape[::2] == place.shape[::2]
            return table and _grid(tensor) ** 2 == tensor.shape[1] - 1
        case "patch_embed.proj.weight":
            return tensor.dim() == 4 and tensor.shape[:2] == place.shape[:2]
        case "decoder_pred.weight":
            return tensor.dim() == 2 and tensor.shape[1] == place.shape[1]
        case "decoder_pred.bias":
            return tensor.dim() == 1
        case _:
            return False


def _grid(table: Tensor) -> int:
    """Patches along each side, of a table of positions with a row for CLS."""
    return math.isqrt(table.shape[1] - 1)


def _misplaced(report: LoadedMae) -> list[str]:
    """Tensors that are no use to the network, but would be to the one that the weights are of."""
    faults = [
        f"{key}: no such tensor in the network"
        for key in report.skipped
        if canonical(key).startswith(BLOCKS)
    ]
    missing = [key for key in report.fresh if key.startswith("decoder_blocks.")]
    if any(key.startswith("decoder_blocks.") for key in report.loaded):
        faults += [f"{key}: missing" for key in missing]
    return faults


def _misfit(
    network: MaskedAutoencoder, given: dict[str, Tensor], source: str, faults: list[str]
) -> WeightsError:
    if any(MARK in fault for fault in faults):
        remedy = "LoRA stands apart in these weights: `kdad export` writes a file with it folded in"
    else:
        remedy = "name the preset that the weights were made for (method.preset)"
        dim = given["cls_token"].shape[-1] if "cls_token" in given else 0
        depth = sum(f"blocks_{n}_norm1_weight" in given for n in range(len(given)))
        presets = [p for p, a in PRESETS.items() if (a.dim, a.depth) == (dim, depth)]
        if presets and (dim, depth) != (network.cls_token.shape[-1], len(network.blocks)):
            remedy += f"; their encoder is that of {', '.join(presets)}"
    return WeightsError(
        f"{source} does not fit the network: {len(faults)} tensors do not match{listed(faults)}",
        remedy,
    )


def together(keys: Sequence[str]) -> list[str]:
    """The keys, those of all blocks counted together."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        first, _, rest = key.partition("blocks.")
        groups.setdefault(f"{first}blocks" if rest else key, []).append(key)
    return [key if [key] == of else f"{key} ({len(of)} tensors)" for key, of in groups.items()]
