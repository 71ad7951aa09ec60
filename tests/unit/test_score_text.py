"""What `kdad score` says of its results, and of those that they replace."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kdad_dist.report.text import scored
from kdad_dist.score.results import warn_of_replaced
from tests.helpers_run import make_run

FINISHED = {"state": "finished", "step": 900, "steps": 900}
READOUT = "reduce max, explain False"


@pytest.fixture
def metrics(tmp_path: Path) -> dict[str, Any]:
    found = json.loads((make_run(tmp_path / "run") / "metrics.json").read_text())
    made = {"checkpoint_step": 213, "readout": READOUT, "latency_ms": None}
    return found | {"synthetic": None, "provenance": {**made, "images_per_second": 9.0}}


def at_step(metrics: dict[str, Any], step: int) -> dict[str, Any]:
    return metrics | {"provenance": metrics["provenance"] | {"checkpoint_step": step}}


def test_the_last_checkpoint_has_a_line_or_is_said_to_be_the_same(metrics):
    assert "last checkpoint" not in scored(metrics, None, FINISHED)
    [line] = [
        x for x in scored(metrics, at_step(metrics, 900), FINISHED).splitlines() if "last" in x
    ]
    assert line.startswith("last checkpoint, step 900")
    assert f"{metrics['mean']['image_auroc']:.4f}" in line
    assert "last checkpoint: the same, step 213" in scored(metrics, metrics, FINISHED)


def test_results_of_an_unfinished_training_say_so(metrics):
    stopped = {"state": "preempted", "step": 215, "steps": 900}
    assert "step 213 of 900: not trained to its end" in scored(metrics, None, stopped)
    for status in ({}, FINISHED, {"state": "failed"}):
        assert "to its end" not in scored(metrics, None, status)


def test_how_far_networks_look_at_the_same_is_told(metrics):
    pair = {"correlation": 0.5, "overlap": None, "images": 3, "without": 0}
    told = scored(metrics | {"agreement": {"gradcam": {"student_teacher": pair}}}, None, FINISHED)
    [line] = [x for x in told.splitlines() if x.startswith("student and teacher, gradcam")]
    assert line.split()[-3:] == ["3", "0.5000", "-"]


def test_results_of_another_reading_are_not_replaced_without_a_word(metrics, tmp_path, caplog):
    file = tmp_path / "metrics.json"
    before = at_step(metrics, 6)
    before["provenance"] |= {"readout": "reduce max, explain True"}
    with caplog.at_level(logging.WARNING):
        for silent in ({}, {"provenance": None}, metrics, at_step(metrics, 6)):
            warn_of_replaced(file, silent, metrics)
        assert not caplog.messages
        warn_of_replaced(file, before | {"synthetic": {"image_auroc": 0.5}}, metrics)
        (tmp_path / "report.html").touch()
        warn_of_replaced(file, before, metrics)
        (tmp_path / "report.html").unlink()
        before["provenance"]["readout"] = "reduce max"
        warn_of_replaced(file, before, metrics)
    first, second, third = caplog.messages
    assert first.endswith("replaces results that were read with explain True, synthetic True")
    assert second.endswith(f"explain True; {tmp_path / 'report.html'} still shows them")
    assert third.endswith("were read without explain False")
