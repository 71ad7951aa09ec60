"""A graph as an ONNX file, which onnxruntime and others run without torch."""

import contextlib
import io

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch.export import ExportedProgram

from kdad_dist.errors import ExportError
from kdad_dist.export.made import Outputs, Runner, reason

OPSET = 20
LARGEST = 2**31 - 2**20
"""Bytes of weights: protobuf stops at 2 GiB, of which the graph itself takes a little."""


def encode(program: ExportedProgram, facts: dict[str, str]) -> bytes:
    """The content of the file, with the facts in `metadata_props`.

    Raises:
        ExportError: it would be too large, or ONNX has no word for one of its operations.
    """
    weights = sum(t.nbytes for t in program.state_dict.values() if isinstance(t, torch.Tensor))
    if weights > LARGEST:
        raise ExportError(
            f"the weights take {weights / 2**30:.1f} GiB, and an ONNX file holds at most 2",
            "export with --format torch",
        )
    outputs = program.call_spec.out_spec
    assert outputs is not None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            converted = torch.onnx.export(
                program,
                opset_version=OPSET,
                input_names=["image"],
                output_names=outputs.context,  # the keys of a dictionary
                dynamic_shapes={"image": {0: "batch"}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"ONNX cannot say what this network does: {reason(error)}",
            "export with --format torch",
        ) from error
    assert converted is not None
    ClearMetadataAndDocStringPass()(converted.model)
    converted.model.metadata_props.update(facts)
    return converted.model_proto.SerializeToString(deterministic=True)


def runner(content: bytes) -> Runner:
    """Runs the file on the CPU as it was written."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(names, {"image": images}), strict=True))  # pyright: ignore

    return run
