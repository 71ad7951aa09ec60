"""`kdad sweep` on this machine: failures, restarts, stops, and runs that start from others."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdad_dist.runtime.watch import is_gone
from tests.kdad import Launched, configured, kdad, standing_still, until
from tests.launcher import wait_for
from tests.sweeps import ODD, many
from tests.tiny import tiny
from tests.warm import stands_in

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    train = {"steps": 4, "batch_size": 4, "log_every": 1, "check_every": 1}
    return many(tmp_path_factory.mktemp("sweep"), (ODD, "tile"), train=train)


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


@pytest.fixture(scope="module")
def warm(warm_python: str) -> Callable[[], None]:
    """Makes the runs of a sweep start at once."""
    return partial(stands_in, warm_python)


def test_a_failing_class_does_not_stop_the_rest_and_is_made_up_for_later(config, warm):
    sweep, shards = config.parent / "many", config.parent / "shards"
    [broken] = shards.glob("tile-train-*.tar")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:1000])
    failed = kdad("sweep", config, "--jobs", 2, first=warm)
    assert failed.codes == [1], failed.text
    assert "1 of 2 runs failed" in failed.text and broken.name in failed.text
    table = json.loads((sweep / "table.json").read_text())
    [missing] = table["missing"]
    assert (missing["category"], missing["state"]) == ("tile", "not started")
    assert broken.name in missing["reason"]
    assert table["categories"][ODD]["image_auroc"]["mean"] is not None
    assert (sweep / ODD / "report.html").is_file()

    broken.write_bytes(whole)
    kept = (sweep / ODD / "metrics.json").stat().st_mtime_ns
    again = kdad("sweep", config, first=warm)
    assert again.codes == [0], again.text
    assert json.loads((sweep / "table.json").read_text())["complete"]
    assert (sweep / ODD / "metrics.json").stat().st_mtime_ns == kept
    selected, final = figures(sweep / ODD)
    same = "last; the same as the selected one, so scored once"
    assert final["provenance"] == selected["provenance"] | {"checkpoint_rule": same}
    assert final["mean"] == selected["mean"] and not (sweep / ODD / "scores-last").exists()


def test_ctrl_c_reaches_all_processes_of_a_sweep_which_is_no_failure(config):
    sweep = config.parent / "left"
    words = ["sweep", config, "name=left", f"output={sweep}", "--jobs", 2, "train.steps=99999"]
    launched = Launched(words, 1, first=os.setsid)
    sweeper = launched.ranks[0].pid or 0
    until(launched, lambda: len(psutil.Process(sweeper).children()) == 2)
    children = psutil.Process(sweeper).children(recursive=True)
    time.sleep(1)  # they begin to import, or have begun to build their runs
    os.killpg(sweeper, signal.SIGINT)
    outcome = launched.wait()
    assert outcome.codes == [75], outcome.text
    assert "2 of 2 runs to go" in outcome.text
    assert "Traceback" not in outcome.text and "failed" not in outcome.text, outcome.text
    wait_for(lambda: all(is_gone(child.pid) for child in children))
    runs = json.loads((sweep / "table.json").read_text())["runs"]
    # They may have come to train before they were left.
    assert all(run["state"] in {"not started", "preempted"} for run in runs), runs


def figures(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the selected and of the final checkpoint."""
    selected, final = (
        json.loads((run / name).read_text()) for name in ("metrics.json", "metrics-last.json")
    )
    return selected, final


def test_a_sweep_of_variants_that_is_asked_to_stop_goes_on_and_starts_one_from_another(
    config, warm
):
    variants = config.parent / "variants.yaml"
    first = "optim.lr: 0.5"  # too high: the best student is an early one
    variants.write_text(
        f"early: {{train.steps: 120, {first}}}\n"
        'late: {train.init_from: "{early}/checkpoints/step_00000120"}\n'
    )
    sweep = config.parent / "stopped"
    words = ["sweep", config, "name=stopped", f"output={sweep}", "data.category=tile"]
    words += ["--variants", variants]
    launched = Launched(words, 1, warm)
    lines = sweep / "early/metrics.jsonl"
    until(launched, lambda: lines.is_file() and lines.stat().st_size > 0)
    with standing_still(sweep / "early"):
        (sweep / "PREEMPT").touch()
        until(launched, (sweep / "early/PREEMPT").exists)
    stopped = launched.wait()
    assert stopped.codes == [75], stopped.text
    assert state(sweep / "early") == "preempted"
    assert not (sweep / "late").exists()
    table = json.loads((sweep / "table.json").read_text())
    assert [run["reason"] for run in table["runs"]] == [None, "early is preempted"]

    done = kdad(*words, timeout=400, first=warm)
    assert done.codes == [0], done.text
    assert "going on from step" in (sweep / "early.log").read_text()
    assert [state(sweep / name) for name in ("early", "late")] == ["finished", "finished"]
    selected, final = figures(sweep / "early")
    steps = [part["provenance"]["checkpoint_step"] for part in (selected, final)]
    assert steps[0] < steps[1] == 120
    assert (sweep / "early/scores-last/scores.csv").is_file()
    assert "the student starts from" in (sweep / "late.log").read_text()
    page = (sweep / "report.html").read_text()
    assert 'href="early/report.html"' in page and 'href="late/report.html"' in page


VARIANTS = """
teacher: {train.steps: 20}
alone: {}
frozen: {method.network.weights: "{teacher}", method.network.freeze: all_but_bn}
kd:
  method.distill: hinton
  method.teacher: {weights: "{teacher}"}
  method.explain: true
  method.beside: {weights: "{alone}"}
ld:
  method.distill: discriminator
  method.teacher: {weights: "{teacher}"}
  method.turns: {period: 2, discriminator: 1}
  method.explain: true
"""
"""As configs/variants/classkd_cifar10.yaml has them."""


def test_one_command_makes_the_table_of_all_ways_to_teach_a_classifier(tmp_path, warm):
    alone = tiny(
        "classkd",
        data={"classes": [f"class{i}" for i in range(10)]},
        method={"distill": "none"},
        optim={"lr": 0.1},
        train={"steps": 2, "batch_size": 20},
    )
    config, variants = configured(tmp_path, alone, 32), tmp_path / "variants.yaml"
    variants.write_text(VARIANTS)
    variants.with_suffix(".csv").write_text(
        "class,metric,value,source,note\nkd,accuracy,0.5,A,chosen on test images\n"
    )
    sweep = tmp_path / "sweep"
    words = ["--variants", variants, f"output={sweep}", "--jobs", 2]
    outcome = kdad("sweep", config, *words, first=warm)
    assert outcome.codes == [0], outcome.text
    table = json.loads((sweep / "table.json").read_text())
    assert (table["rows"], table["complete"], table["mean"]) == ("variant", True, None)
    assert list(table["categories"]) == ["teacher", "alone", "frozen", "kd", "ld"]
    needs = {run["category"]: run["needs"] for run in table["runs"]}
    assert (needs["teacher"], needs["ld"]) == ([], ["teacher"])
    assert set(needs["kd"]) == {"teacher", "alone"}
    text = (sweep / "table.md").read_text()
    pairs = {"kd": {"student_teacher", "student_beside", "teacher_beside"}}
    pairs["ld"] = {"student_teacher"}
    for name, row in table["categories"].items():
        selected, final = figures(sweep / name)
        found = [row["accuracy"][kind]["mean"] for kind in ("selected", "final")]
        assert found == [part["mean"]["accuracy"] for part in (selected, final)]
        assert f"| {name:7} |     1 | {found[0]:8.4f} |\n" in text
        assert row["image_auroc"]["mean"] is None
        assert row["accuracy"]["published"] == {"published": 0.5 if name == "kd" else None}
        agreement = selected.get("agreement", {})
        assert {kind: set(found) for kind, found in agreement.items()} == (
            dict.fromkeys(["gradcam", "gradcam++"], pairs[name]) if name in pairs else {}
        )
        page = (sweep / name / "report.html").read_text()
        assert ("What the networks look at" in page) == (name in pairs)
    assert "Published accuracy: A (chosen on test images)." in text
