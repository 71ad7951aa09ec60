"""The modes in which the processes of a launch train one student, and what each cannot do."""

from kdad_dist.config.run import RunConfig
from kdad_dist.errors import ConfigError
from kdad_dist.methods.base import Method

MODES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
"""Who holds what, beside its rows of a batch: all of it (ddp), a part of everything (fsdp2, zero3),
of optimizer and gradients (zero2), or of the optimizer (zero1)."""


def refuse_mode(config: RunConfig, method: Method, mode: str) -> None:
    """Refuses what cannot be trained in a mode, before anything is wrapped.

    Raises:
        ConfigError: naming the reason.
    """
    assert mode in MODES, mode
    if method.relates_images and config.train.micro_batch_size is not None:
        raise ConfigError(
            "train.micro_batch_size cuts batches into passes, and the loss of this method relates "
            "each image to all others of its batch",
            "set train.micro_batch_size=null, and choose a train.batch_size that the processes "
            "hold at once",
        )
    if mode.startswith("zero") and config.train.precision == "fp16":
        raise ConfigError(
            f"train.precision is fp16, and DeepSpeed ({mode}) would scale the loss by rules of its "
            "own: an update that it skips would not be the one that other modes skip",
            "set train.precision=bf16, or launch with another mode (KDAD_MODE=multi_gpu or fsdp2)",
        )
    if mode == "zero3" and config.train.compile:
        raise ConfigError(
            "train.compile=true, and the parameters that zero3 has divided are empty when the "
            "compiler looks at them",
            "set train.compile=false, or launch with another mode (KDAD_MODE=zero2 or multi_gpu)",
        )
    if mode.startswith("zero") and len(method.parts) > 1:
        raise ConfigError(
            f"the method trains {' and '.join(method.parts)} in turns, and DeepSpeed ({mode}) has "
            "one optimizer for all weights: the moments of the one that rests would move on too",
            "launch with another mode (KDAD_MODE=multi_gpu or fsdp2)",
        )
