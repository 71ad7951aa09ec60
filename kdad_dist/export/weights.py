"""The student's weights alone, LoRA merged, the same bytes for the same weights."""

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from kdad_dist.config.run import RunConfig
from kdad_dist.errors import ExportError
from kdad_dist.export.made import Made
from kdad_dist.models.lora import MARK, layers, merged_tensors
from kdad_dist.models.weights import listed
from kdad_dist.runtime.restore import Trained, restore, saved_tensors
from kdad_dist.wording import amount


def weights(config: RunConfig, compared: int) -> Made:
    """`student.safetensors`: the weights of a network without LoRA.

    What LoRA learnt is added to the weights it adapts. `train.init_from` reads the file, and
    `method.weights` of a masked autoencoder.

    Args:
        compared: test images, at most, on which merged weights are compared with the run; 0: all.

    Raises:
        ExportError: the file does not hold what the checkpoint holds, or says something else.
    """
    trained = restore(config)
    merged = merged_tensors(trained.method.network)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in merged.items()}
    content = save(tensors, {"format": "pt"})
    given = load(content)
    adapted = layers(trained.method.network)
    facts = {
        "checkpoint_step": trained.step,
        "checkpoint_rule": trained.rule,
        "lora_merged": bool(adapted),
        "tensors": len(given),
        "tensors_of_checkpoint": len(given) - len(adapted),
    }
    compare_with_checkpoint(config, trained, given)
    if adapted:
        from kdad_dist.export.merged import compare_merged  # whose imports take a second

        facts["parity"] = compare_merged(config, trained, given, compared)
    return Made("student.safetensors", content, facts)


def compare_with_checkpoint(
    config: RunConfig, trained: Trained, given: Mapping[str, Tensor]
) -> None:
    """Compares the file's tensors, bit for bit, with what the checkpoint's files hold.

    Frozen ones, which are in no checkpoint, are those of the network, where they are known by their
    hash. Weights into which LoRA was merged are compared by what the network says, not here.

    Raises:
        ExportError: one differs, or there are others.
    """
    student, network = trained.method.student, trained.method.network
    [path] = [name for name, part in student.named_modules() if part is network]
    prefix = f"{path}." if path else ""
    expected = dict(network.state_dict())
    for name, tensor in saved_tensors(config, trained.step).items():
        if name.startswith(prefix):
            expected[name.removeprefix(prefix)] = tensor
    merged = {f"{name}.weight" for name in layers(network)}
    learnt = {f"{name}.{MARK}{matrix}" for name in layers(network) for matrix in "AB"}
    wanted = expected.keys() - learnt
    compared = (wanted & given.keys()) - merged
    faults = {name for name in compared if not same(expected[name].cpu(), given[name])}
    if faults := sorted(faults | (wanted ^ given.keys())):
        raise ExportError(
            f"{amount(len(faults), 'tensor')} of the export not as in the checkpoint, nothing "
            f"was written:{listed(faults)}",
            "report this as a fault",
        )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers of the same kind."""
    return one.dtype == other.dtype and torch.equal(one, other)
