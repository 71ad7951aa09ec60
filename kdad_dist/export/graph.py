"""A detector or a classifier as one graph of tensor operations: pixels in, what it says out.

Everything that `kdad score` computes between decoded pixels of the right size and what it reports
is inside: the window in the centre, normalisation, teacher and student (LoRA merged), map,
smoothing, standardisation and the reduction to a score, or the probabilities of classes.
"""

import copy
import importlib.util
import json
import logging
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kdad_dist import __version__
from kdad_dist.config.changes import digest
from kdad_dist.config.methods import MkdConfig
from kdad_dist.config.run import RunConfig
from kdad_dist.detector import Detector, eight_bits, of_run
from kdad_dist.errors import ExportError, UsageError
from kdad_dist.export.made import Made, reason
from kdad_dist.export.parity import compare
from kdad_dist.methods.readout import Readout, readout_of
from kdad_dist.models.lora import merge
from kdad_dist.tiling import middle

log = logging.getLogger(__name__)
ONNX = ("onnx", "onnxscript", "onnxruntime")
SOURCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""What torch.export notes of the code behind each operation: paths of this machine among it."""


class Graph(nn.Module):
    """What a graph is made of.

    Args:
        readout: without LoRA, on the CPU.
        size: side of the window, in the centre of an image, that it looks at.
    """

    def __init__(self, readout: Readout, size: int) -> None:
        super().__init__()
        self.readout = readout
        self.size = size

    def forward(self, image: UInt8[Tensor, "b s s 3"]) -> dict[str, Tensor]:
        """Those of OUTPUTS that the method gives."""
        if image.shape[1] > self.size:  # a cut that takes all would be a step of the graph too
            window = middle(image.shape[1], self.size)
            image = image[:, window, window]
        pixels = image.permute(0, 3, 1, 2).float() / 255  # a .pt2 then refuses floats
        # All tiles at once: a graph cannot count how many parts they would be.
        said = self.readout.finish(self.readout.predict(pixels, largest=None))
        given = {"pred_score": said.pred_score, "anomaly_map": said.anomaly_map}
        if said.reconstruction is not None:
            given["reconstruction"] = eight_bits(said.reconstruction)
        if said.logits is not None:
            given |= {"logits": said.logits, "probabilities": said.logits.softmax(1)}
            given["pred_label"] = said.logits.argmax(1)
        return {name: value for name, value in given.items() if value is not None}


def graph_file(config: RunConfig, kind: Literal["onnx", "torch"], compared: int) -> Made:
    """`detector.onnx` or `detector.pt2` (`classifier...`), compared with the run.

    Raises:
        UsageError: the run has no graph, or a library is missing.
        ExportError: there is no such graph of this network, or it says something else.
    """
    refuse_what_has_no_graph(config)
    if kind == "onnx":
        check_installed()
        from kdad_dist.export.onnx import encode, runner
    else:
        from kdad_dist.export.pt2 import encode, runner
    detector = of_run(config, torch.device("cpu"))
    log.info("writing down what the network computes, which may take a minute")
    said = facts(detector)
    content = encode(traced(detector), said)
    parity = compare(detector, runner(content), compared)
    trained = detector.trained
    made = {"checkpoint_rule": trained.rule, "facts": said, "parity": parity}
    stem = "classifier" if config.tells_classes else "detector"
    name = f"{stem}.{'onnx' if kind == 'onnx' else 'pt2'}"
    return Made(name, content, {"checkpoint_step": trained.step, **made})


def check_installed() -> None:
    """Raises UsageError where a library for ONNX is missing."""
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx needs {', '.join(missing)}, not installed here",
            "pip install 'kdad_dist[export]', or export with --format torch",
        )


def refuse_what_has_no_graph(config: RunConfig) -> None:
    """Raises UsageError for what is no plain function from pixels to maps."""
    method = config.method
    if isinstance(method, MkdConfig) and method.localise != "none":
        raise UsageError(
            f"method.localise is {method.localise}: these maps are gradients, computed by going "
            "back through the network, which a graph for inference cannot do",
            "add method.localise=none to export the scores alone (after `kdad score` with the same "
            "word, so that there is a threshold)",
        )
    if config.score.precision != "no":
        raise UsageError(
            f"score.precision is {config.score.precision}, which processors round differently",
            "add score.precision=no (after `kdad score` with the same word)",
        )


def traced(detector: Detector) -> ExportedProgram:
    """The graph, for batches of any size.

    Raises:
        ExportError: torch cannot follow what the network does.
    """
    method = copy.deepcopy(detector.readout.method)
    method.student = method.network
    if detector.config.tells_classes:
        method.teacher = None  # which only explains
    merge(method)
    config = detector.config
    readout = Readout(method, config.score, config.data.tiling, detector.readout.standard)
    graph = Graph(readout, config.data.image_size).eval()
    graph.requires_grad_(False)
    size = config.data.read_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = {"image": {0: Dim("batch", min=1)}}
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (example,), dynamic_shapes=batch)
    except (RuntimeError, ValueError, TypeError) as error:  # torch's own and the network's
        raise ExportError(
            f"this network cannot be written as a graph: {reason(error)}",
            "use `kdad_dist.load` where the detector runs, or another backbone",
        ) from error
    for node in program.graph.nodes:
        for key in SOURCE:
            node.meta.pop(key, None)
    return program


def facts(detector: Detector) -> dict[str, str]:
    """What a program needs to know to use the file without us: kept inside of it."""
    config, limit = detector.config, detector.threshold
    known = {
        "program": f"kdad_dist {__version__}",
        "run": config.name,
        "method": config.method.name,
        "image_size": config.data.read_size,
        "resize": detector.fit.mode,
        "threshold": limit.value,
        "pixel_threshold": limit.pixel_value,
        "readout": readout_of(config),
        "checkpoint_step": detector.trained.step,
        "config_digest": digest(config),
        "classes": json.dumps(config.data.classes) if config.tells_classes else None,
    }
    return {name: str(value) for name, value in known.items() if value is not None}
