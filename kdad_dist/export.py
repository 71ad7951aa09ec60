"""One file with the student's weights, LoRA merged, the same bytes for the same weights."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from kdad_dist import files
from kdad_dist.config import RunConfig, digest, plain
from kdad_dist.errors import CheckpointError
from kdad_dist.models.lora import merged_tensors
from kdad_dist.runtime.restore import restore


def export(config: RunConfig) -> tuple[Path, float]:
    """Writes `export/student.safetensors` below the run, from the chosen checkpoint.

    Nothing but the weights stands in it, those of a network without LoRA: what LoRA learnt is added
    to the weights it adapts. `manifest.json` beside it says where they come from. `train.init_from`
    reads it, and `method.weights` of a masked autoencoder.

    Returns:
        The file, and the largest difference of a weight read back from it (0 in any sound case).
    """
    trained = restore(config)
    student = trained.method.network
    merged = merged_tensors(student)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in merged.items()}
    content = save(tensors, {"format": "pt"})
    folder = config.directory / "export"
    path = folder / "student.safetensors"
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
        files.write_bytes(path, content)
        difference = parity(tensors, path)
        files.write_json(
            folder / "manifest.json",
            {
                "file": path.name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "method": plain(config)["method"],
                "classes": config.data.classes,
                "config_digest": digest(config),
                "checkpoint_step": trained.step,
                "checkpoint_rule": trained.rule,
                "lora_merged": merged.keys() != student.state_dict().keys(),
                "largest_difference": difference,
            },
        )
    return path, difference


def parity(tensors: dict[str, torch.Tensor], path: Path) -> float:
    """The largest difference between the tensors and what the file gives back.

    Raises:
        CheckpointError: the file lacks one of them.
    """
    stored = load_file(path)
    if stored.keys() != tensors.keys():
        raise CheckpointError(f"{path} does not hold what was exported", "export again")
    return max(
        (stored[name].double() - tensor.double()).abs().max().item()
        for name, tensor in tensors.items()
        if tensor.numel()
    )
