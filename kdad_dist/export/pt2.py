"""A graph as torch's own file, .pt2, which needs torch alone."""

import io
import json
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from kdad_dist.export.made import Outputs, Runner

FACTS = "facts.json"
"""The file inside that says how to use it."""


def encode(program: ExportedProgram, facts: dict[str, str]) -> bytes:
    """The content of the file."""
    program.example_inputs = None  # they would be pickled
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Of weights in channels-last memory, which are complete, but not contiguous.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
    return file.getvalue()


def runner(content: bytes) -> Runner:
    """Runs the file as it was written."""
    module = torch.export.load(io.BytesIO(content)).module()

    @torch.no_grad()
    def run(images: NDArray[np.uint8]) -> Outputs:
        said = module(torch.from_numpy(images))
        return {name: values.numpy() for name, values in said.items()}

    return run
