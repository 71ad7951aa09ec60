"""The student's weights alone, LoRA merged, the same bytes for the same weights."""

import torch
from safetensors.torch import load, save

from kdad_dist.config.run import RunConfig
from kdad_dist.errors import ExportError
from kdad_dist.export.made import Made
from kdad_dist.models.lora import merged_tensors
from kdad_dist.runtime.restore import restore


def weights(config: RunConfig) -> Made:
    """`student.safetensors`: the weights of a network without LoRA.

    What LoRA learnt is added to the weights it adapts. `train.init_from` reads the file, and
    `method.weights` of a masked autoencoder.
    """
    trained = restore(config)
    student = trained.method.network
    merged = merged_tensors(student)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in merged.items()}
    content = save(tensors, {"format": "pt"})
    facts = {
        "checkpoint_step": trained.step,
        "checkpoint_rule": trained.rule,
        "lora_merged": merged.keys() != student.state_dict().keys(),
        "largest_difference": largest_difference(tensors, content),
    }
    return Made("student.safetensors", content, facts)


def largest_difference(tensors: dict[str, torch.Tensor], content: bytes) -> float:
    """Between the tensors and what the file gives back: 0 in any sound case.

    Raises:
        ExportError: the file lacks one of them.
    """
    stored = load(content)
    if stored.keys() != tensors.keys():
        raise ExportError("the file does not hold what was exported", "export again")
    return max(
        (stored[name].double() - tensor.double()).abs().max().item()
        for name, tensor in tensors.items()
        if tensor.numel()
    )
