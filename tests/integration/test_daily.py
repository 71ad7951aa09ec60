"""The commands of every day: what a person sees of runs that others keep working on."""

import json
import signal
from pathlib import Path

import pytest

from kdad_dist.config.load import load
from kdad_dist.doctor.checks import Request, examine, training
from kdad_dist.doctor.disk import shards
from kdad_dist.status.survey import look
from tests.integration.test_training import CONFIG
from tests.kdad import Launched, configured, kdad, until

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return configured(tmp_path_factory.mktemp("daily"), CONFIG, size=32)


def test_a_training_is_seen_at_work_and_when_it_was_killed(config, monkeypatch):
    run = config.parent / "seen"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    more = ["train.steps=100000", "train.validate_every=9999", "checkpoint.every_steps=5"]
    training = Launched(["train", config, f"output={run}", *more], 1)
    until(training, lambda: (look(run, content=False).step or 0) > 0)
    until(training, lambda: look(run, content=False).checkpoint is not None)
    seen = look(run, content=False)
    assert (seen.state, seen.reason, seen.steps, seen.job) == ("running", None, 100_000, "4711")
    assert seen.process and seen.process.startswith(f"pid {training.ranks[0].pid} on ")
    assert seen.loss and seen.images_per_second and seen.seconds_left

    watching = Launched(["status", config.parent, "--watch"], 1)
    screen = Path(watching.folder.name) / "rank_0"
    until(watching, lambda: screen.is_file() and "/100000" in screen.read_text())
    watching.kill(signal.SIGINT)
    outcome = watching.wait()
    assert outcome.codes == [130], outcome.text
    assert "Traceback" not in outcome.text

    training.kill()
    training.wait()
    outcome = kdad("status", run, "--json")
    assert outcome.codes == [0], outcome.text
    [told] = json.loads(outcome.text[outcome.text.index('{\n  "runs"') :])["runs"]
    assert told["state"] == "stale" and "has ended without a word" in told["reason"]

    newest = sorted(run.glob("checkpoints/step_*/*.distcp"))[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    outcome = kdad("status", run, "--verify")
    assert outcome.codes == [1], outcome.text
    assert f"{newest} is damaged: its content does not match its sha256" in outcome.text


def test_the_doctor_connects_processes_and_says_what_a_configuration_needs(config, monkeypatch):
    monkeypatch.setenv("KDAD_MODE", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = kdad("doctor", config, "--launch", 2, "--directory", config.parent, "--json")
    assert outcome.codes == [0], outcome.text
    text = outcome.text
    found = json.loads(text[text.index('{\n  "findings"') : text.rindex("}") + 1])["findings"]
    states = {finding["name"]: finding["state"] for finding in found}
    assert "problem" not in states.values(), text
    assert {"python", "torch", "gloo", "disk", "hub", "shards", "training", "launch"} <= set(states)
    said = {finding["name"]: finding["found"] for finding in found}
    assert "2 processes, mode ddp, cpu, gloo: " in said["launch"]
    assert f"{config.parent} (" in text
    assert "can start on 2 processes, mode ddp: 16 images" in said["training"]
    assert "HF_HUB_OFFLINE is set" in said["hub"]

    gone = load(config, [f"data.shards={config.parent / 'gone'}"])
    checks = [("shards", shards), ("training", training)]
    refused = list(examine(Request(gone, [], None), checks))
    assert [finding.state for finding in refused] == ["problem", "note"]
    assert refused[0].found == f"{config.parent / 'gone'} does not exist"


def test_the_doctor_looks_at_the_mode_that_a_launch_from_here_would_have(config, monkeypatch):
    half = load(config, ["train.precision=fp16"])
    said = []
    for mode in ("multi_gpu", "zero2"):
        monkeypatch.setenv("KDAD_MODE", mode)
        said += examine(Request(half, [], 3), [("training", training)])
    assert [finding.state for finding in said] == ["ok", "problem"]
    assert "can start on 3 processes, mode ddp" in said[0].found
    assert "DeepSpeed (zero2) would scale the loss" in said[1].found
