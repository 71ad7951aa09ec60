"""Real launchers: what they start, and what is refused because they started something else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documents import FOUND
from tests.helpers import make_mvtec
from tests.kdad import succeeds
from tests.needs import REPOSITORY

pytestmark = pytest.mark.launch

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    make_mvtec(folder / "images", train=8)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    path = folder / "tiny.yaml"
    teacher = {"backbone": "resnet10t", "weights": "random", "layers": [1]}
    text = {
        "name": "tiny",
        "data": {"shards": str(folder / "shards"), "image_size": 32},
        "method": {"teacher": teacher},
        "optim": {"name": "adam", "lr": 1.0e-3},
        "train": {"steps": 2, "batch_size": 4, "log_every": 1},
    }
    path.write_text(yaml.safe_dump(text))
    return path


def launch(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    return subprocess.run(
        [str(word) for word in words],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=REPOSITORY,
    )


def test_the_shipped_cpu_file_starts_as_many_processes_as_asked_for(config):
    run = config.parent / "two"
    [line] = [c.text for c in FOUND if c.where == "launch/README.md" and "cpu.yaml" in c.text]
    assert line.startswith("ACCELERATE_USE_CPU=true accelerate launch ")
    words = line.replace("CONFIG", str(config)).split()[3:]
    done = launch(*LAUNCH, *words, f"output={run}", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "2 processes, mode ddp" in done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2


@pytest.mark.parametrize(
    "options",
    [
        ["--cpu", "--num_processes", "2"],
        ["--config_file", "multi_cpu.yaml"],
    ],
    ids=["--cpu", "MULTI_CPU without MPI"],
)
def test_a_launcher_that_starts_one_process_in_silence_is_found_out(config, options, tmp_path):
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "mixed_precision": "no",
    }
    (tmp_path / "multi_cpu.yaml").write_text(yaml.safe_dump(settings))
    options = [str(tmp_path / o) if o.endswith(".yaml") else o for o in options]
    run = tmp_path / "run"
    done = launch(*LAUNCH, *options, "-m", "kdad_dist", "train", config, f"output={run}")
    assert done.returncode != 0
    assert "2 processes, but 1 came up" in done.stderr
    assert not (run / "checkpoints").exists()


def test_fsdp_is_not_dropped_in_silence_and_its_first_version_is_refused(
    config, tmp_path, warm_python
):
    words = ["--use_fsdp", "--num_processes", 1, "--num_machines", 1, "--fsdp_version"]
    program = ["-m", "kdad_dist", "train", config]
    done = launch(warm_python, *LAUNCH[1:], *words, 2, *program, f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert "mode fsdp2" in done.stderr and "student: FSDP" in done.stderr
    done = launch(warm_python, *LAUNCH[1:], *words, 1, *program, f"output={tmp_path / 'one'}")
    assert done.returncode != 0
    assert "FSDP version 1" in done.stderr
    assert not (tmp_path / "one").exists()


def test_one_process_needs_no_launcher(config, warm_python):
    run = config.parent / "one"
    words = [warm_python, "-m", "kdad_dist", "train", config, f"output={run}"]
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    assert "1 process, device cpu, precision no" in done.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
