"""A DeepSpeed configuration may choose what costs time and memory, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

from kdad_dist.config.load import load
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import UsageError
from kdad_dist.runtime.zero_config import plugin, refuse_strangers, settle
from tests.needs import REPOSITORY

pytest.importorskip("deepspeed")


def config(*words: str) -> RunConfig:
    return load("stfpm_mvtec", ["data.shards=none", *words])


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The DeepSpeed configuration that the launcher names."""
    path = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return path


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_configurations_are_accepted_and_completed(asked: Path, stage: int):
    shipped = json.loads((REPOSITORY / f"launch/deepspeed/zero{stage}.json").read_text())
    asked.write_text(json.dumps(shipped))
    made = plugin(on_cpu=False)
    assert made.zero_stage == stage
    settings = made.deepspeed_config
    settle(settings, config("optim.clip=2.5", "train.precision=bf16"))
    assert settings["gradient_clipping"] == 2.5
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["torch_autocast"]["enabled"]
    assert not settings.get("bf16", {}).get("enabled")


def test_without_a_file_the_launchers_own_variables_decide(asked: Path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    made = plugin(on_cpu=False)
    settle(made.deepspeed_config, config())
    assert made.zero_stage == 3
    # accelerate's own choice would be 1.0, without a word.
    assert made.deepspeed_config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": True, "loss_scale": 8}}, "fp16.enabled"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "give a number"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0"),
        ({"zero_optimization": {}}, "zero_optimization.stage = None"),
        ({"zero_optimization": {"stage": 2, "parameter_alignment": True}}, "parameter_alignment"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "own Adam"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantized_weights"),
    ],
)
def test_what_would_change_the_training_is_refused_by_name(settings: dict, named: str):
    with pytest.raises(UsageError, match=named):
        refuse_strangers({"zero_optimization": {"stage": 2}, **settings})


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(UsageError, match=r"scheduler\.type.*tensor_parallel\.autotp_size"):
        refuse_strangers({"scheduler": {"type": "x"}, "tensor_parallel": {"autotp_size": 2}})


def test_sections_that_are_off_are_no_reason():
    off = {"device": "none", "pin_memory": True}
    stages = {"stage": 3, "offload_optimizer": off, "offload_param": off}
    refuse_strangers({"fp16": {"enabled": False}, "zero_optimization": stages})


@pytest.mark.parametrize(
    ("key", "value", "source"),
    [
        ("gradient_clipping", 1.0, "optim.clip"),
        ("gradient_accumulation_steps", 4, "train.micro_batch_size"),
        ("train_batch_size", 32, "train.batch_size"),
    ],
)
def test_two_that_differ_are_not_settled_in_silence(key: str, value: float, source: str):
    with pytest.raises(UsageError, match=f"{key}: {value}, but {source}"):
        settle({key: value}, config())


def test_a_file_that_is_not_there_is_named(asked: Path):
    with pytest.raises(UsageError, match=r"ds\.json"):
        plugin(on_cpu=False)


def test_where_accelerate_would_drop_deepspeed_the_launch_is_refused(asked: Path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UsageError, match="ACCELERATE_USE_CPU"):
        plugin(on_cpu=True)


def test_without_deepspeed_the_package_to_install_is_named(asked: Path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"kdad_dist\[deepspeed\]"):
        plugin(on_cpu=True)
