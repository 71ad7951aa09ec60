"""Which runs a sweep has, what it takes for done, what its table says, and what SLURM is told."""

import csv
import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from kdad_dist.config import dump
from kdad_dist.data.writer import pack
from kdad_dist.errors import ConfigError, KdadError, Preempted, UsageError
from kdad_dist.report_text import COLUMNS
from kdad_dist.sweep import Job, Sweep, choose, folder, plan
from kdad_dist.sweep_local import Outcome, environments, reason, refuse_failures
from kdad_dist.sweep_slurm import submit
from kdad_dist.sweep_table import write_table
from tests.helpers import make_mvtec, save_image, texture

ODD = "a, b|'c' \"d\" $(touch e)"
"""A class whose name is a list, a table cell and a shell command at once."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with shards of two classes and a configuration for them."""
    place = tmp_path_factory.mktemp("sweep")
    for category in (ODD, "tile"):
        make_mvtec(place / "images", category, train=3, good=1, scratch=1)
    pack(place / "images", place / "shards", size=32)
    return place


@pytest.fixture
def config(place, tmp_path) -> str:
    values = {
        "name": "many",
        "output": str(tmp_path / "many"),
        "data": {"shards": str(place / "shards"), "image_size": 32},
        "optim": {"lr": 0.1},
        "train": {"steps": 2},
        "seed": 5,
    }
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "many.yaml")


def finish(job: Job, **figures: float | None) -> None:
    """Leaves a run as training and scoring do."""
    job.run.mkdir(parents=True)
    (job.run / "config.yaml").write_text(dump(job.config))
    os.utime(job.run / "config.yaml", (1e9, 1e9))  # scoring comes later
    (job.run / "status.json").write_text('{"state": "finished"}')
    values = dict.fromkeys(COLUMNS, None) | figures
    (job.run / "metrics.json").write_text(json.dumps({"mean": values}))


def planned(config: str, seeds: int = 1, *asked: str, **overrides: object) -> Sweep:
    return plan(config, [f"{k}={v}" for k, v in overrides.items()], asked or ["all"], seeds)


def test_a_sweep_has_one_run_for_each_class_and_seed(config):
    sweep = planned(config, 2)
    assert [(job.run.name, job.config.seed) for job in sweep.jobs] == [
        (ODD, 5),
        ("tile", 5),
        (f"{ODD}-seed6", 6),
        ("tile-seed6", 6),
    ]
    assert sweep.jobs[0].config.data.category == ODD
    assert sweep.jobs[0].config.track.group == "many"


def test_classes_become_normal_one_after_the_other(config, tmp_path):
    for name in ("no", "yes"):
        save_image(tmp_path / f"images/train/{name}/0.png", texture(0))
        save_image(tmp_path / f"images/test/{name}/0.png", texture(1))
    pack(tmp_path / "images", tmp_path / "shards", size=32)
    sweep = plan(config, [f"data.shards={tmp_path / 'shards'}"], ["all"], 1)
    assert [job.config.data.normal_class for job in sweep.jobs] == ["no", "yes"]
    assert [job.run.name for job in sweep.jobs] == ["no", "yes"]


def test_classes_are_named_with_commas_between_or_one_by_one():
    known = ["a", "b", "c, d"]
    assert choose(["b,a"], known, "") == ("b", "a")
    assert choose(["c, d", "a"], known, "") == ("c, d", "a")
    assert choose(["all", "a"], known, "") == ("a", "b", "c, d")
    with pytest.raises(ConfigError, match=r"'x', 'y'.*\n.*choose from: a, b, c, d"):
        choose(["x,a,y"], known, "")


def test_no_class_leaves_the_directory_of_the_sweep_or_takes_its_files():
    names = ["../up", "..", ".hidden", "a/b", "sweep", "%2e"]
    stems = [folder(name) for name in names]
    assert len(set(stems)) == len(names)
    assert not any("/" in stem or stem.startswith(".") or stem == "sweep" for stem in stems)
    assert folder("metal nut") == "metal nut"


def test_what_is_done_is_left_alone_until_it_is_wanted_otherwise(config):
    first, second = planned(config).jobs
    assert first.state() == "not started"
    finish(first)
    assert first.state() == "scored"
    assert planned(config).left() == [second]
    smoother = planned(config, **{"score.smooth_sigma": 2}).jobs[0]
    assert smoother.state() == "not scored"


def test_a_run_that_was_started_again_after_it_was_scored_is_not_done(config):
    job = planned(config).jobs[0]
    finish(job)
    os.utime(job.run / "metrics.json", (1e9 - 1, 1e9 - 1))
    assert job.state() == "not scored"
    (job.run / "status.json").write_text('{"state": "preempted"}')
    assert job.state() == "preempted"


def test_a_sweep_does_not_start_in_the_directory_of_a_run(config):
    directory = planned(config).directory
    directory.mkdir()
    (directory / "config.yaml").write_text("")
    with pytest.raises(UsageError, match="directory of a run"):
        planned(config)


def test_the_table_has_mean_and_deviation_over_seeds_and_says_what_is_missing(config):
    sweep = planned(config, 2)
    odd, tile, odd_again, tile_again = sweep.jobs
    finish(odd, image_auroc=0.5)
    finish(tile, image_auroc=0.9, pixel_auroc=0.7)
    finish(odd_again, image_auroc=0.7)
    found = write_table(sweep)
    assert found["categories"][ODD]["image_auroc"] == {
        "mean": pytest.approx(0.6),
        "deviation": pytest.approx(0.2 / 2**0.5),
    }
    assert found["categories"]["tile"]["image_auroc"] == {"mean": 0.9, "deviation": None}
    assert found["mean"]["image_auroc"] == {"mean": pytest.approx(0.75), "deviation": None}
    assert found["mean"]["pixel_auroc"]["mean"] == 0.7
    assert not found["complete"]
    [missing] = found["missing"]
    assert (missing["category"], missing["seed"], missing["state"]) == ("tile", 6, "not started")
    assert "tile, seed 6: not started" in (sweep.directory / "table.md").read_text()

    finish(tile_again, image_auroc=0.9)
    found = write_table(sweep)
    assert found["complete"] and not found["missing"]
    # 0.7 and 0.8 are the means over classes of the two seeds.
    assert found["mean"]["image_auroc"]["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert json.loads((sweep.directory / "table.json").read_text()) == found


def test_names_survive_csv_and_markdown(config):
    sweep = planned(config)
    for job in sweep.jobs:
        finish(job, image_auroc=0.5)
    write_table(sweep)
    with (sweep.directory / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["runs"], row["is_mean"]) for row in rows] == [
        (ODD, "1", "0"),
        ("tile", "1", "0"),
        ("mean", "2", "1"),
    ]
    assert float(rows[0]["image_auroc"]) == 0.5 and rows[0]["pixel_auroc"] == ""
    lines = (sweep.directory / "table.md").read_text().splitlines()
    columns = {line.replace("\\|", "").count("|") for line in lines}
    assert columns == {len(COLUMNS) + 3}


def test_a_failed_run_stands_in_the_table_with_its_reason(config):
    sweep = planned(config)
    sweep.jobs[1].run.mkdir(parents=True)
    status = {"state": "failed", "reason": "the loss is not finite\nand more"}
    (sweep.jobs[1].run / "status.json").write_text(json.dumps(status))
    write_table(sweep)
    text = (sweep.directory / "table.md").read_text()
    assert "tile, seed 5: failed: the loss is not finite\n" in text
    assert "mean of 0 of 2" in text


def test_gpus_and_cores_are_divided_among_the_runs_under_way(monkeypatch):
    for name in ("KDAD_MODE", "KDAD_PROCESSES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def shares(at_once: int, *gpus: str) -> list[str | None]:
        return [e.get("CUDA_VISIBLE_DEVICES") for e in environments(at_once, gpus)]

    assert shares(2) == [None, None]
    assert shares(2, "0", "1", "2", "3") == ["0,1", "2,3"]
    assert shares(2, "0", "MIG-a", "5") == ["0", "MIG-a,5"]
    assert shares(3, "0", "1") == ["0", "1", "0"]
    assert environments(2, [])[0]["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in environments(1, [])[0]
    monkeypatch.setenv("KDAD_MODE", "multi_gpu")
    assert environments(2, ["0", "1", "2"])[1]["KDAD_PROCESSES"] == "2"


def test_the_reason_of_a_failure_is_the_last_commands_own_message(config):
    job = planned(config).jobs[1]
    assert job.last_words() is None
    job.log.parent.mkdir()
    text = "== train\nkdad: of before\n== train\nstep 1\n"
    job.log.write_text(text)
    assert job.last_words() is None
    assert reason(job, 3).startswith("exit code 3")
    job.log.write_text(f"{text}kdad: bad data\n  -> pack again\nTraceback of a launcher\n")
    assert reason(job, 1) == "bad data\n  -> pack again"
    assert reason(job, -9) == "killed by SIGKILL"
    [missing] = write_table(planned(config, 1, "tile"))["missing"]
    assert missing["reason"].startswith("bad data")


def test_failures_weigh_more_than_runs_that_may_go_on(config):
    good, bad = planned(config).jobs
    refuse_failures([Outcome(good)])
    with pytest.raises(Preempted, match="1 of 2"):
        refuse_failures([Outcome(good), Outcome(bad, 75)])
    with pytest.raises(KdadError, match="tile: no memory") as raised:
        refuse_failures([Outcome(good, 75), Outcome(bad, 1, "no memory")])
    assert raised.value.exit_code == 1


def test_slurm_is_told_the_unfinished_runs_word_by_word(config):
    sweep = planned(config, 2)
    finish(sweep.jobs[1])
    told = submit(sweep, 4, ["--partition=gpu"], dry_run=True)
    assert told.array[-3:] == [str(job.file) for job in sweep.left()]
    assert "--array=0-2%4" in told.array and "--partition=gpu" in told.array
    assert f"--categories={ODD}" in told.collect and "--seeds=2" in told.collect
    assert "--dependency=afterany:ARRAY" in told.collect
    # What a person sees may be pasted into a shell; what is run never passes one.
    assert shlex.split(told.text().splitlines()[-2]) == told.array
    assert not sweep.directory.joinpath("sweep.sbatch").exists()


def test_without_sbatch_a_sweep_says_so(config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="no sbatch"):
        submit(planned(config), None, [], dry_run=False)
