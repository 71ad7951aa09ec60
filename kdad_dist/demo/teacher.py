"""A teacher for where no pretrained one is at hand: random weights, with statistics that fit."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from kdad_dist.config.methods import TeacherConfig
from kdad_dist.models.backbone import build_backbone

SEED = 0
IMAGES = 32
"""Enough: the statistics are means over 32 x 32 and more positions of each image."""


def write_teacher(path: Path, config: TeacherConfig, images: NDArray[np.uint8]) -> None:
    """Writes an untrained network of this architecture as a weights file.

    Its convolutions are drawn at random and stay so. Its batch normalisations get the statistics
    of `images`, (n, h, w, 3), and let every residual branch through (timm starts them at zero):
    so each channel answers to something that differs between the places of such images.
    """
    if path.is_file():
        return
    net = build_backbone(config.backbone, "random", config.layers, SEED)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            module.momentum = None  # the plain average
            module.reset_running_stats()
    pixels = torch.from_numpy(images[:IMAGES]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        net.train()(net.normalize(pixels))
    state = {key: value.contiguous() for key, value in net.network.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    partial.rename(path)
