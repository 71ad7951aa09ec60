"""What a launch says to DeepSpeed, and what the run's own configuration says to it.

A DeepSpeed configuration chooses the stage and the sizes of buffers. What decides the weights
stands in the run's YAML alone: where both speak of it and differ, the launch is refused.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

from kdad_dist.config.changes import flatten
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import UsageError

AUTO = "auto"
ANYWHERE = {"comms_logger", "dump_state", "memory_breakdown", "steps_per_print",
            "wall_clock_breakdown", "zero_allow_untested_optimizer"}  # fmt: skip
"""Keys of DeepSpeed that change no weight."""
OF_STAGES = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients",
    "ignore_unused_parameters", "overlap_comm", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "stage", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
}  # fmt: skip
"""The same, of `zero_optimization`."""
SWITCHES = {
    "fp16.enabled": "train.precision decides",
    "bf16.enabled": "train.precision decides, and weights stay float32",
    "zero_optimization.offload_optimizer.device": "only DeepSpeed's own Adam works there",
    "zero_optimization.offload_param.device": "it was not tried",
}
"""Sections that may be there as long as they are off, and why."""


class Plugin(DeepSpeedPlugin):
    def set_deepspeed_weakref(self) -> None:
        """Nothing: this would tell `transformers`, which then had to be installed."""


def plugin(on_cpu: bool) -> DeepSpeedPlugin:
    """What accelerate needs, from the variables that its launcher leaves.

    Raises:
        UsageError: DeepSpeed is not installed, or its configuration asks for what is decided
            elsewhere or not known here.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "the launcher asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED), which is not installed",
            "pip install 'kdad_dist[deepspeed]', or launch in another mode",
        )
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise UsageError(
            "the launcher asks for DeepSpeed, and ACCELERATE_USE_CPU is set, with which accelerate "
            "trains under DDP instead, without a word",
            "unset it; with KDAD_DEVICE=cpu, launch/train.sh runs DeepSpeed on the CPU",
        )
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed import ops

        # It would be compiled for gloo at the first start; without a compiler the start would fail.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        made = Plugin(zero3_init_flag=False)
    except ValueError as error:
        raise UsageError(
            f"the DeepSpeed configuration of this launch cannot be used: {error}",
            "take launch/deepspeed/zero2.json as a pattern",
        ) from None
    refuse_strangers(made.deepspeed_config)
    return made


def refuse_strangers(settings: Mapping[str, Any]) -> None:
    """Refuses keys that would change the training behind the back of the run's configuration.

    Raises:
        UsageError: naming all of them.
    """
    faults = []
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):  # DeepSpeed would take 0 where accelerate takes 2
        faults.append(f"zero_optimization.stage = {stage!r} (the stages here are 1, 2 and 3)")
    for key, value in flatten(settings):
        switch = next((s for s in SWITCHES if key.startswith(s.rpartition(".")[0] + ".")), None)
        if switch is not None:
            if key == switch and value not in (False, "none", AUTO):
                faults.append(f"{key} = {value!r} ({SWITCHES[switch]})")
        elif key.partition(".")[0] in ANYWHERE or key in decided(None):
            continue
        elif value == AUTO:
            faults.append(f'{key} = "auto" (only transformers fills that in; give a number)')
        elif key.removeprefix("zero_optimization.") not in OF_STAGES:
            faults.append(f"{key} (not known to leave the training as it is)")
    if faults:
        raise UsageError(
            f"the DeepSpeed configuration of this launch has {', '.join(faults)}",
            "take these keys out; launch/deepspeed/ has configurations that work",
        )


def decided(config: RunConfig | None) -> dict[str, tuple[Any, str]]:
    """Keys of DeepSpeed that the run's configuration decides: their values, and where it does.

    Micro-batches are accumulated by the training loop, as in every other mode.
    """
    clip = (config.optim.clip if config else None) or 0.0
    return {
        "gradient_clipping": (clip, "optim.clip"),
        "gradient_accumulation_steps": (1, "train.micro_batch_size"),
        "train_micro_batch_size_per_gpu": (1, "train.micro_batch_size"),
        "train_batch_size": (AUTO, "train.batch_size"),
    }


def settle(settings: dict[str, Any], config: RunConfig) -> None:
    """Completes the settings of DeepSpeed, in place, by what the run's configuration decides.

    Raises:
        UsageError: both decide, and differ.
    """
    for key, (value, source) in decided(config).items():
        found = settings.get(key, AUTO)
        if found not in (AUTO, value):
            raise UsageError(
                f"the DeepSpeed configuration of this launch says {key}: {found}, but {source} of "
                "the run decides that",
                f'take {key} out of it, or say "{AUTO}"',
            )
        settings[key] = value
    if config.train.precision == "bf16":
        # Without safe modules: gradients are summed in float32, as in every other mode.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
