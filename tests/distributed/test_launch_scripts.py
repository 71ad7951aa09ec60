"""The launch scripts start what they say and leave with the run's own exit code."""

import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch

from kdad_dist.runtime.launcher import exit_code, saved, tells_more
from tests.needs import REPOSITORY
from tests.shards import make_shards

pytestmark = pytest.mark.launch

CONFIG = """
name: tiny
data: {shards: SHARDS, image_size: 32}
method: {name: stfpm, teacher: {weights: random}}
optim: {name: sgd, lr: 0.1}
train: {steps: 4, batch_size: 4, check_every: 1}
"""


@pytest.fixture
def config(tmp_path: Path, warm_python: str) -> Path:
    make_shards(tmp_path / "shards", size=32, packed_size=32)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(tmp_path / "shards")))
    (tmp_path / "python").symlink_to(warm_python)
    return path


def train(config: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return script("train", config, *overrides, **variables)


def script(
    verb: str, subject: Path, *overrides: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs launch/VERB.sh on a configuration, or on a run beside one; the doctor's on none."""
    folder = next(path for path in subject.parents if (path / "tiny.yaml").exists())
    own = {"KDAD_PYTHON": str(folder / "python"), "KDAD_CACHE": str(folder / "cache")}
    return subprocess.run(
        [REPOSITORY / f"launch/{verb}.sh", *([] if verb == "doctor" else [subject]), *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | own | variables,
        capture_output=True,
        text=True,
    )


def status(config: Path) -> dict[str, object]:
    return json.loads((config.parent / "runs/tiny/status.json").read_text())


def test_the_script_starts_as_many_cpu_processes_as_it_is_told(config: Path) -> None:
    result = train(config, KDAD_PROCESSES="3")
    assert result.returncode == 0, result.stderr
    assert "3 processes" in result.stderr
    assert status(config)["state"] == "finished"


def test_a_preempted_run_leaves_with_75_and_a_later_mistake_does_not(config: Path) -> None:
    stopped = train(config, "train.steps=400", "train.max_time=0.0001", KDAD_PROCESSES="2")
    assert stopped.returncode == 75, stopped.stderr
    assert status(config)["state"] == "preempted"
    # What an earlier launch left behind is not taken for the outcome of this one.
    refused = train(config, "optim.lr=-1", KDAD_PROCESSES="2")
    assert refused.returncode == 2, refused.stderr
    assert "optim.lr" in refused.stderr and "torch/distributed" not in refused.stderr


def test_a_mistake_is_told_however_late_the_process_that_tells_it_starts(
    config: Path, warm_python: str
) -> None:
    slow = config.parent / "slow"
    slow.write_text(f'#!/bin/sh\n[ "$RANK" = 1 ] || sleep 1\nexec {warm_python} "$@"\n')
    slow.chmod(0o755)
    refused = train(config, "optim.lr=-1", KDAD_PROCESSES="2", PYTHON_EXEC=str(slow))
    assert refused.returncode == 2 and refused.stderr.count("kdad: ") == 1, refused.stderr


def test_the_doctor_is_launched_as_a_training_is(config: Path) -> None:
    result = script("doctor", config, KDAD_PROCESSES="2")
    assert "2 processes, mode ddp, cpu, gloo: " in result.stderr + result.stdout
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_sharded_training_runs_on_the_cpu_where_that_is_asked_for(config: Path, mode: str) -> None:
    variables = {"KDAD_MODE": mode, "KDAD_DEVICE": "cpu", "KDAD_PROCESSES": "2"}
    result = script("train", config, "train.steps=2", **variables)
    assert result.returncode == 0, result.stderr
    assert f"2 processes, mode {mode}, device cpu" in result.stderr
    assert status(config)["state"] == "finished"
    # Scoring shards nothing: every process loads the whole student.
    result = script("score", config.parent / "runs/tiny", **variables)
    assert result.returncode == 0, result.stderr
    assert "2 processes, mode ddp, device cpu" in result.stderr


def test_a_scoring_whose_launcher_is_asked_to_stop_leaves_with_75() -> None:
    assert exit_code("score", 128 + 15, saved=False) == 75
    assert exit_code("train", 128 + 15, saved=False) == 128 + 15
    assert exit_code("train", 128 + 15, saved=True) == 75
    assert exit_code("score", 1, saved=False) == 1
    assert exit_code("score", 0, saved=False) == 0


def test_a_launch_has_saved_only_where_its_own_training_stopped_in_order() -> None:
    stopped, left, failed = (
        json.dumps({"state": state, "reason": reason})
        for state, reason in (
            ("preempted", "stopped after step 3 of 9"),
            ("preempted", "interrupted"),  # by a second Ctrl-C
            ("failed", "no memory"),
        )
    )
    assert saved(failed, stopped)
    assert not saved(stopped, stopped)
    assert not saved("", left)
    assert not saved(stopped, failed)
    assert not saved("", "")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"KDAD_PROCESSES": "two"}, "KDAD_PROCESSES is 'two'"),
        ({"KDAD_PROCESSES": "0"}, "KDAD_PROCESSES is '0'"),
        ({"KDAD_MODE": "zero2", "KDAD_PROCESSES": ""}, "KDAD_MODE=zero2 needs KDAD_PROCESSES"),
        ({"KDAD_MACHINES": "2"}, "KDAD_MACHINE_RANK is ''; set it to this machine's number"),
        ({"KDAD_MACHINES": "2", "KDAD_MACHINE_RANK": "2"}, "number, from 0 to 1"),
        ({"KDAD_MACHINES": "2", "KDAD_MACHINE_RANK": "1"}, "needs KDAD_MAIN_ADDRESS"),
        ({"KDAD_MODE": "Multi-GPU"}, "did you mean multi_gpu?"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_refused(
    config: Path, variables: dict[str, str], said: str
) -> None:
    result = script("train", config, **variables)
    assert result.returncode == 2
    assert said in result.stderr


@pytest.mark.parametrize("job", ["train", "score", "sweep", "collect"])
def test_a_job_that_is_started_instead_of_submitted_says_how_to(job: str) -> None:
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    words = ["bash", f"slurm/{job}.sbatch", "it"]
    result = subprocess.run(words, cwd=REPOSITORY, env=outside, capture_output=True, text=True)
    assert result.returncode == 2
    assert "submit it: sbatch " in result.stderr and f"slurm/{job}.sbatch" in result.stderr


def test_only_what_no_process_could_tell_is_left_of_torchs_lines() -> None:
    def told(text: str, *words: object) -> bool:
        return tells_more(logging.LogRecord("", logging.ERROR, "", 0, text, words, None))

    failed = "failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s"
    assert not told(failed, 2, 0, 7, "python")
    assert told(failed, -9, 0, 7, "python")
    assert not told("Sending process %s closing signal %s", 7, "SIGTERM")
    assert told("Unable to shutdown process %s via %s, forcefully exiting via %s", 7, "a", "b")


def test_a_device_that_a_mode_does_not_have_is_refused(config: Path) -> None:
    result = script("train", config, KDAD_MODE="gpu", KDAD_DEVICE="cpu")
    assert result.returncode == 2
    assert "KDAD_DEVICE is 'cpu'" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_launch_on_gpus_is_refused_where_there_are_none(config: Path, tmp_path: Path) -> None:
    words = ["train", config, f"output={tmp_path / 'run'}"]
    result = script(*words, KDAD_MODE="fsdp2", KDAD_PROCESSES="1")
    assert result.returncode == 2, result.stderr
    assert "asks for GPUs" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_mode_is_refused_by_name(config: Path) -> None:
    result = train(config, KDAD_MODE="tpu")
    assert result.returncode == 2
    assert "tpu" in result.stderr and "multi_gpu" in result.stderr
