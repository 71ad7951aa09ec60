"""Files for other programs: a student's weights, or all that judges an image as one graph."""

import hashlib
from typing import Any, Literal

from kdad_dist import __version__, files
from kdad_dist.config.changes import digest
from kdad_dist.config.load import plain
from kdad_dist.config.run import RunConfig
from kdad_dist.export.made import Made
from kdad_dist.models.weights import MANIFEST
from kdad_dist.runtime.progress import uncounted
from kdad_dist.runtime.rundir import warn_if_unfinished

Format = Literal["safetensors", "onnx", "torch"]


COMPARED: dict[Format, int] = {"safetensors": 4, "onnx": 64, "torch": 64}
"""Test images on which a file is compared with the run, where nothing else is asked for. Merged
weights that are wrong are so on each of them, and should not take long to get."""


def export(config: RunConfig, kind: Format, compared: int | None = None) -> dict[str, Any]:
    """Writes one file below `export/` of the run, from the chosen checkpoint, once it is checked.

    `manifest.json` beside it says of each file there what it holds and how it was checked.

    Args:
        compared: test images, at most, on which a graph, or merged weights, are compared with the
            run; 0: all. None: as many as `COMPARED` says.

    Returns:
        The file's entry in the manifest, and its `path`.

    Raises:
        UsageError: the run cannot be exported like this; nothing is written.
        ExportError: what came out differs from the run; nothing is written.
        CheckpointError, DataError: the run is not sound, or the file cannot be written.
    """
    made = make(config, kind, COMPARED[kind] if compared is None else compared)
    entry = {
        "bytes": len(made.content),
        "sha256": hashlib.sha256(made.content).hexdigest(),
        "program": f"kdad_dist {__version__}",
        "method": plain(config)["method"],
        "classes": config.data.classes,
        "config_digest": digest(config),
        **made.facts,
    }
    folder = config.directory / "export"
    with files.writing(folder), uncounted(f"writing {made.name}"):
        folder.mkdir(exist_ok=True)
        files.write_bytes(folder / made.name, made.content)
        with files.in_turn(folder / MANIFEST):
            before = files.read_json(folder / MANIFEST)
            known = {name: old for name, old in before.items() if (folder / name).exists()}
            files.write_json(folder / MANIFEST, {**known, made.name: entry})
    warn_if_unfinished(config.directory, made.facts["checkpoint_step"])
    return {"path": str(folder / made.name), **entry}


def make(config: RunConfig, kind: Format, compared: int) -> Made:
    """The checked content of a file."""
    if kind == "safetensors":
        from kdad_dist.export.weights import weights

        return weights(config, compared)
    with uncounted("loading torch.export"):
        from kdad_dist.export.graph import graph_file

    return graph_file(config, kind, compared)
