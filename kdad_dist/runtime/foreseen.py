"""How a launch from here would train, before it: what `launch/environment.sh` makes of KDAD_MODE
and its like, or without these a session of the variables that accelerate's launcher sets.
"""

import json
import os
from pathlib import Path

import torch

from kdad_dist.config.run import RunConfig
from kdad_dist.errors import UsageError
from kdad_dist.runtime import launch, zero_config
from kdad_dist.runtime.modes import MODES
from kdad_dist.wording import meant

ASKED = {"cpu": "ddp", "gpu": "ddp", "multi_gpu": "ddp"} | {mode: mode for mode in MODES[1:]}
"""What KDAD_MODE may be, and the mode that it means."""


def foreseen_mode(config: RunConfig) -> str:
    """One of MODES.

    Raises:
        UsageError: the launch would be refused.
    """
    asked = os.environ.get("KDAD_MODE")
    if not asked:
        mode = launch.asked_mode(os.environ)
        if mode != "zero":
            return mode
        return f"zero{zero_config.plugin(not torch.cuda.is_available()).zero_stage}"
    if asked not in ASKED:
        raise UsageError(
            f"KDAD_MODE is {asked!r}; known are {', '.join(ASKED)}",
            f"{meant(asked, ASKED)}set it to one of these, or unset it",
        )
    own = os.environ.get("KDAD_DEEPSPEED")
    if own and asked.startswith("zero"):
        return f"zero{stage(Path(own), config)}"
    return ASKED[asked]


def stage(path: Path, config: RunConfig) -> int:
    """That of a DeepSpeed configuration, which decides the mode, once it is clear that it decides
    nothing else.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        if not isinstance(settings.get("zero_optimization", {}), dict):
            raise ValueError("its zero_optimization holds no settings")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"KDAD_DEEPSPEED names {path}, which cannot be read: {error}",
            "take launch/deepspeed/zero2.json as a pattern",
        ) from None
    zero_config.refuse_strangers(settings)
    zero_config.settle(settings, config)
    return settings["zero_optimization"]["stage"]


def foreseen_processes() -> int:
    """On all machines; one where nothing is said of them that could be launched."""
    if os.environ.get("KDAD_MODE") == "gpu":
        return foreseen("KDAD_MACHINES")
    return foreseen("KDAD_PROCESSES") * foreseen("KDAD_MACHINES")


def foreseen(name: str) -> int:
    text = os.environ.get(name, "")
    return max(1, int(text)) if text.isdecimal() else 1
