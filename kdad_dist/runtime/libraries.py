"""What accelerate and DeepSpeed are set to do on this machine, before anything is launched."""

import importlib.util
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

SETTINGS = ("ACCELERATE_", "FSDP_", "DEEPSPEED_", "KDAD_")
"""Beginnings of the names of variables by which a launch is told what to do."""


def accelerate_file() -> Path:
    """The file that `accelerate launch` takes where none is named."""
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file)


def accelerate_settings() -> dict[str, Any] | None:
    """What stands in that file; None where there is none.

    Raises:
        OSError, ValueError, yaml.YAMLError: it cannot be read.
    """
    path = accelerate_file()
    if not path.is_file():
        return None
    found = yaml.safe_load(path.read_text(encoding="utf-8"))  # or JSON, which is YAML
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings")
    return found


def variables() -> dict[str, str]:
    """Variables of the environment that tell a launch what to do."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)}


def deepspeed() -> dict[str, Any] | None:
    """Version, and the operators of its own that are there or could be compiled; None: not there.

    Raises:
        Exception: whatever importing it does on a machine for which it is not made.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for one otherwise, and says so
    with redirect_stdout(sys.stderr):  # where its log would go for the life of the process
        from deepspeed import __version__, ops
        from deepspeed.git_version_info import installed_ops

    return {
        "version": __version__,
        "installed": sorted(name for name, there in installed_ops.items() if there),
        "compatible": sorted(name for name, can in ops.__compatible_ops__.items() if can),
    }
