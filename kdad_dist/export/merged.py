"""Whether weights into which LoRA was merged say what the run says, in a network without LoRA."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdad_dist.config.run import RunConfig
from kdad_dist.detector import Detector, assemble
from kdad_dist.export.made import Runner
from kdad_dist.export.parity import compare, said_by
from kdad_dist.methods.readout import Readout
from kdad_dist.models.lora import load_merged
from kdad_dist.runtime.restore import Trained


def compare_merged(
    config: RunConfig, trained: Trained, given: Mapping[str, Tensor], most: int
) -> dict[str, Any]:
    """As `compare`, of the run's network and of one without LoRA that has the given tensors."""
    # bfloat16 would round merged weights otherwise, and what normal maps look like is no weight.
    score = replace(config.score, precision="no", standardise=False)
    detector = assemble(replace(config, score=score), trained, torch.device("cpu"))
    return compare(detector, runner(detector, given), most)


def runner(detector: Detector, given: Mapping[str, Tensor]) -> Runner:
    """Judges as the detector does, by the given tensors."""
    method = copy.deepcopy(detector.trained.method)
    method.student = method.network
    load_merged(method.student, given)
    method.requires_grad_(False)
    readout = Readout(method, detector.readout.config, detector.readout.tiling)
    return partial(said_by, replace(detector, readout=readout))
