"""Environments of their own for the projects that we measure ourselves against.

    python benchmarks/peers.py        # makes the environment (several minutes, some GB), once

It lies under a cache folder, `~/.cache/kdad_dist/peers` or the one that KDAD_PEERS names, never in
the repository, so that nothing a peer depends on reaches ours.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ANOMALIB = "anomalib==2.7.0"


def peer_python() -> Path:
    """The interpreter of an environment with anomalib, which is made first where it is absent.

    It gets the torch, torchvision and timm that run here, where these can be told: a comparison
    should not measure two versions of torch. An environment that was not completed is made anew.
    """
    folder = Path(os.environ.get("KDAD_PEERS", "~/.cache/kdad_dist/peers")).expanduser()
    environment = folder / ANOMALIB.replace("==", "-")
    python = environment / "bin" / "python"
    complete = environment / "complete.json"
    if complete.is_file():
        return python
    print(f"Making {environment} with {ANOMALIB}; this takes a few minutes.", file=sys.stderr)
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", ANOMALIB, "safetensors"]
    subprocess.run([*install, *_same_versions()], check=True, stdout=sys.stderr)
    complete.write_text(json.dumps(versions(python)))
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions that matter to a comparison, as that interpreter sees them."""
    names = ["anomalib", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy"]
    code = (
        "import json, sys, importlib.metadata as m;"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    run = subprocess.run(
        [str(python), "-c", code, *names], check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout)


def _same_versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    pins = []
    for name in ("torch", "torchvision", "timm"):
        try:
            pins.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            pins.append(name)
    return pins


if __name__ == "__main__":
    print(json.dumps({"python": str(peer_python()), **versions(peer_python())}, indent=2))
