"""Every benchmark runs to its end at a toy's size; what it prints there says nothing of speed.

But for `stfpm.py` and `stfpm_quality.py`, which want anomalib in an environment of its own.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import save_file

from tests.kdad import configured, succeeds
from tests.needs import REPOSITORY
from tests.tiny import tiny

pytestmark = [pytest.mark.soak, pytest.mark.launch]

TOYS = {
    "checkpoint.py --rounds 1 --methods tiny": "| tiny | 2 | accelerate save_state |",
    "launch.py --rounds 1 --processes 1": "| warm / bare |",
    "loop.py --method tiny --steps 2 --rounds 1": "of the time of the bare step more",
    "loramae.py images/tile --preset mae_vit_tiny_patch8 --size 64 --batch 2 --epochs 4"
    " --train-images 4 --test-images 1 --threads 1": "the same with equal weights",
    "memory.py": "| large | 1 | bf16 |",
    "metrics.py --no-peer": "target 1e-4 of the exact value",
    "mkd.py --batch 2 --size 32 --images 1 --copies 2 --rounds 1": "SmoothGrad, 1 images",
    "modes.py --method tiny --batch 4 --steps 2 --processes 2": "| zero3 | 2 |",
    "projection.py": "| loramae_mvtec | 1024 |",
    "reading.py --root images --size 32 --epochs 2 --workers 1": "in memory with 2 rank(s)",
    "scaling.py --methods tiny --steps 2": "| tiny | 16 |",
    "stfpm_step.py resnet18.safetensors --batch 2 --size 64 --rounds 1": "bf16, cached teacher",
    "stfpm_summed.py 4 train stfpm.yaml output=summed": "",
    "tiles.py shards 32 stfpm stfpm --set score.smooth_sigma=2": "x |",
    "stfpm_choices.py stfpm --out stfpm.json": "candidates in stfpm.json",
    "loramae_choices.py loramae --out loramae.json --only '4 diagonal'": "in loramae.json",
    "results_tables.py --runs Tiles stfpm stfpm --choices stfpm.json --top 3": "Tiles | images |",
    "results_tables.py --choices loramae.json --around masks='4 diagonal' error=pixel sigma=2"
    " standardise=no score=max": "| masks | error | sigma |",
}
"""What is typed, and a part of what it prints. The last ones read what those before them wrote."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photographs, their shards, a scored run of each of two methods, and weights."""
    folder = tmp_path_factory.mktemp("benchmarks")
    config = configured(folder, tiny("stfpm"), size=32)
    other = yaml.safe_load(config.read_text())["data"]
    (folder / "loramae.yaml").write_text(yaml.safe_dump({**tiny("loramae"), "data": other}))
    for method in ("stfpm", "loramae"):
        succeeds("train", folder / f"{method}.yaml", f"output={folder / method}")
    succeeds("score", folder / "stfpm")
    resnet = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))
    save_file(resnet.state_dict(), folder / "resnet18.safetensors")
    return folder


@pytest.mark.parametrize("words", TOYS, ids=lambda words: words.partition(".")[0])
def test_every_benchmark_runs_to_its_end(folder: Path, words: str):
    script, *options = shlex.split(words)
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / script, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert TOYS[words] in done.stdout
