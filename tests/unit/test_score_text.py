"""What `kdad score` says of its results, and of those that they replace."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kdad_dist.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
from kdad_dist.report.text import scored
from kdad_dist.runtime.rundir import unfinished, warn_if_unfinished
from kdad_dist.score.results import threshold, warn_of_replaced
from tests.helpers_run import make_run, write_json

READOUT = "reduce max, explain False"


@pytest.fixture
def metrics(tmp_path: Path) -> dict[str, Any]:
    found = json.loads((make_run(tmp_path / "run") / "metrics.json").read_text())
    made = {"checkpoint_step": 213, "readout": READOUT, "latency_ms": None}
    made["checkpoint_rule"] = "lowest loss on held-out images"
    return found | {"synthetic": None, "provenance": {**made, "images_per_second": 9.0}}


def at_step(metrics: dict[str, Any], step: int) -> dict[str, Any]:
    return told(metrics, checkpoint_step=step)


def told(metrics: dict[str, Any], **provenance: Any) -> dict[str, Any]:
    return metrics | {"provenance": metrics["provenance"] | provenance}


def test_the_other_checkpoint_has_a_line_or_is_said_to_be_the_same(metrics):
    assert "checkpoint" not in scored(metrics)
    last = told(metrics, checkpoint_step=900, checkpoint_rule="last")
    for own, other, name in ((metrics, last, "last"), (last, metrics, "selected")):
        [line] = [x for x in scored(own, other).splitlines() if "checkpoint" in x]
        step = other["provenance"]["checkpoint_step"]
        assert line.startswith(f"{name} checkpoint, step {step}")
        assert f"{metrics['mean']['image_auroc']:.4f}" in line
    same = told(metrics, checkpoint_rule="last; the same as the selected one, so scored once")
    assert "last checkpoint: the same, step 213" in scored(metrics, same)
    assert "selected checkpoint: the same, step 213" in scored(same, metrics)


def test_what_the_threshold_does_stands_below_the_table(metrics):
    limit = {"value": 0.353, "images": 1, "true_positive_rate": 0.0, "false_positive_rate": None}
    text = scored(metrics | {"threshold": limit})
    assert (
        "\n\nthreshold: 0.353, from 1 held-out image: finds 0.0% of the defective images\n" in text
    )
    text = scored(metrics | {"threshold": limit | {"images": 10, "false_positive_rate": 0.0333}})
    assert "and raises a false alarm on 3.3% of the normal ones\n" in text
    for nothing in ({}, {"threshold": limit | {"value": None}}):
        without = {key: value for key, value in metrics.items() if key != "threshold"}
        assert "threshold" not in scored(without | nothing)


def test_a_threshold_of_few_images_errs_to_either_side(caplog):
    config = RunConfig("x", DataConfig("s"), OptimConfig(lr=1), TrainConfig(steps=1))
    rows = [{"pred_score": score, "map_max": None} for score in (1.0, 5.18)]
    assert threshold(config, rows)["value"] == 5.18
    [message] = caplog.messages
    assert "rests on 2 held-out images only" in message
    assert "false alarms or missed defects" in message


def test_results_of_an_unfinished_training_say_so(metrics, tmp_path, caplog):
    words = "step 213 of 900: not trained to its end"
    write_json(tmp_path / "status.json", {"state": "preempted", "step": 215, "steps": 900})
    assert unfinished(tmp_path, 213) == words
    assert scored(metrics, None, [words]).endswith(f"\n{words}")
    warn_if_unfinished(tmp_path, 213)
    assert caplog.messages == [f"{tmp_path}: {words}"]
    for status in ({}, {"state": "finished", "step": 900, "steps": 900}, {"state": "failed"}):
        write_json(tmp_path / "status.json", status)
        assert unfinished(tmp_path, 213) is None


def test_how_far_networks_look_at_the_same_is_told(metrics):
    pair = {"correlation": 0.5, "overlap": None, "images": 3, "without": 0}
    text = scored(metrics | {"agreement": {"gradcam": {"student_teacher": pair}}})
    [line] = [x for x in text.splitlines() if x.startswith("student and teacher, gradcam")]
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
