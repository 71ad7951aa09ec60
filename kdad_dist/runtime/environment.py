"""What a run was made with: versions, machine, commit. Nothing of the environment's variables."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import kdad_dist

PACKAGES = ("torch", "accelerate", "timm", "numpy", "scipy", "scikit-learn", "pillow")


def describe() -> dict[str, Any]:
    import torch  # takes seconds, which those who only read runs need not wait

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpus[0] if gpus else None,
        "devices": len(gpus),
        "commit": commit(),
        "version": kdad_dist.__version__,
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from, `+` where files differ from it."""
    folder = Path(kdad_dist.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(  # noqa: S603
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(  # noqa: S603
            [*git, "status", "--porcelain", "--untracked-files=no", "."],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
