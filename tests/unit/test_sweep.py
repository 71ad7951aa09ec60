"""Which runs a sweep has, what it takes for done, and what SLURM is told."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from kdad_dist.config.load import load
from kdad_dist.data.writer import pack
from kdad_dist.errors import ConfigError, Interrupted, KdadError, Preempted, UsageError
from kdad_dist.runtime.rundir import refuse_changes
from kdad_dist.runtime.stopping import StopRequest
from kdad_dist.sweep import slurm
from kdad_dist.sweep.jobs import Sweep, stages
from kdad_dist.sweep.local import Outcome, Runner, environments, reason, refuse_failures, told
from kdad_dist.sweep.plan import choose, folder, plan, plan_variants, reopen
from kdad_dist.sweep.slurm import submit
from kdad_dist.sweep.table import write_table
from tests.helpers import save_image, texture
from tests.sweeps import ODD, finish


def planned(config: Path, seeds: int = 1, *asked: str, **overrides: object) -> Sweep:
    return plan(str(config), [f"{k}={v}" for k, v in overrides.items()], asked or ["all"], seeds)


def test_a_sweep_has_one_run_for_each_class_and_seed(config):
    sweep = planned(config, 2)
    assert [(job.run.name, job.config.seed) for job in sweep.jobs] == [
        (ODD, 5),
        ("zip", 5),
        (f"{ODD}-seed6", 6),
        ("zip-seed6", 6),
    ]
    assert sweep.jobs[0].config.data.category == ODD
    assert sweep.jobs[0].config.track.group == "many"


def test_classes_become_normal_one_after_the_other(config, tmp_path):
    for name in ("no", "yes"):
        save_image(tmp_path / f"images/train/{name}/0.png", texture(0))
        save_image(tmp_path / f"images/test/{name}/0.png", texture(1))
    pack(tmp_path / "images", tmp_path / "shards", size=32)
    sweep = plan(str(config), [f"data.shards={tmp_path / 'shards'}"], ["all"], 1)
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
    (first.run / "metrics-last.json").unlink()  # as sweeps once left it
    assert (first.state(), first.reason()) == ("not scored", "only its selected checkpoint is")


def test_a_run_that_was_started_again_after_it_was_scored_is_not_done(config):
    job = planned(config).jobs[0]
    finish(job)
    for name in ("metrics.json", "metrics-last.json"):
        os.utime(job.run / name, (1e9 - 1, 1e9 - 1))
    assert job.state() == "not scored"
    (job.run / "status.json").write_text('{"state": "preempted"}')
    assert job.state() == "preempted"


def test_a_sweep_does_not_start_in_the_directory_of_a_run(config):
    directory = planned(config).directory
    directory.mkdir()
    (directory / "config.yaml").write_text("")
    with pytest.raises(UsageError, match="directory of a run") as caught:
        planned(config)
    assert shlex.split(caught.value.remedy)[-1] == f"output={directory}-sweep"


def test_a_run_does_not_start_in_the_directory_of_a_sweep(config):
    sweep = planned(config)
    sweep.write(sweep.jobs)
    for job in sweep.jobs:
        refuse_changes(job.config)
    with pytest.raises(ConfigError, match="directory of a sweep") as caught:
        refuse_changes(sweep.base)
    assert shlex.split(caught.value.remedy)[-1] == f"output={sweep.directory}-one"


def test_a_run_does_not_start_among_images_or_in_the_place_of_a_file(config, tmp_path):
    def starts(output: str) -> None:
        refuse_changes(load(config, [f"output={tmp_path / output}"]))

    for name in ("photos/train/cat.png", "pred.py", "new/.lock", "new/PREEMPT", "new/status.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("new/logs/slurm-7.out", "new/stopped.txt", "new/teacher.pth", "new/train.o12"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for output in ("new", "absent/deep"):
        starts(output)
    with pytest.raises(ConfigError, match=r"photos holds no run, but .*train/cat.png") as caught:
        starts("photos")
    assert shlex.split(caught.value.remedy)[-1] == f"output={tmp_path / 'photos'}-one"
    for output in ("pred.py", "pred.py/run"):
        with pytest.raises(ConfigError, match=r"pred.py is a file, not the directory of a run"):
            starts(output)


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
    job.log.write_text(f"{text}kdad: {Interrupted()}\n")
    assert job.last_words() is None and job.fate() == "not started"
    job.log.write_text(f"{text}kdad: bad data\n  -> pack again\nTraceback of a launcher\n")
    [missing] = write_table(planned(config, 1, "zip"))["missing"]
    assert missing["reason"].startswith("bad data")


def test_failures_weigh_more_than_runs_that_may_go_on(config):
    good, bad = planned(config).jobs
    refuse_failures([Outcome(good)])
    with pytest.raises(Preempted, match="1 of 2"):
        refuse_failures([Outcome(good), Outcome(bad, 75)])
    with pytest.raises(KdadError, match="zip: no memory") as raised:
        refuse_failures([Outcome(good, 75), Outcome(bad, 1, "no memory")])
    assert raised.value.exit_code == 1


def test_slurm_is_told_the_unfinished_runs_word_by_word(config):
    sweep = planned(config, 2)
    finish(sweep.jobs[1])
    told = submit(sweep, 4, ["--partition=gpu"], dry_run=True)
    [array] = told.arrays
    assert array[-3:] == [str(job.file) for job in sweep.left()]
    assert "--array=0-2%4" in array and "--partition=gpu" in array
    assert told.collect[-1] == str(sweep.directory)
    assert "--dependency=afterany:ARRAY1" in told.collect
    # What a person sees may be pasted into a shell; what is run never passes one.
    lines = told.text().splitlines()
    assert [shlex.split(line) for line in lines[-2:]] == [array, told.collect]
    for name in ("sweep.sbatch", "collect.sbatch"):
        assert f"# {name}:" in lines
        assert not sweep.directory.joinpath(name).exists()


def test_where_nothing_can_be_submitted_a_sweep_says_so_and_writes_nothing(
    config, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = planned(config)
    with pytest.raises(UsageError, match="no sbatch"):
        submit(sweep, None, [], dry_run=False)
    for program, text in (("sbatch", "error: no partition"), ("sinfo", "fatal: no answer")):
        script = tmp_path / program
        script.write_text(f"#!/bin/sh\necho first >&2; echo '{program}: {text}' >&2; exit 1\n")
        script.chmod(0o755)
    for patience, why in ((60, "sinfo: fatal: no answer"), (0, "sinfo has said nothing for 0 s")):
        monkeypatch.setattr(slurm, "PATIENCE", patience)
        with pytest.raises(KdadError, match=rf"no SLURM controller .* \({why}\)") as refusal:
            submit(sweep, None, [], dry_run=False)
        assert refusal.value.exit_code == 1
    assert not sweep.directory.exists()
    (tmp_path / "sinfo").unlink()  # then sbatch alone can tell
    with pytest.raises(KdadError, match="sbatch: error: no partition"):
        submit(sweep, None, [], dry_run=False)


VARIANTS = """
sum: {method.combine: sum}
again: {train.init_from: "{sum}", data.category: zip}
other: {optim.lr: 0.5}
last: {train.init_from: "{again}/checkpoints/step_00000002"}
"""


@pytest.fixture
def variants(config, tmp_path) -> Sweep:
    (tmp_path / "variants.yaml").write_text(VARIANTS)
    changes = ["optim.weight_decay=0.25"]
    return plan_variants(str(config), changes, str(tmp_path / "variants.yaml"), 2)


def test_a_variant_starts_from_the_run_that_it_names_in_braces(variants):
    first = variants.jobs[:4]
    assert [job.name for job in first] == ["sum", "again", "other", "last"]
    total, again, other, final = first
    assert again.config.train.init_from == str(total.run)
    assert final.config.train.init_from == f"{again.run}/checkpoints/step_00000002"
    assert (again.needs, final.needs, other.needs) == ((total,), (again,), ())
    assert variants.jobs[5].needs == (variants.jobs[4],)  # of its own seed
    assert total.config.method.combine == "sum"
    assert {job.config.optim.weight_decay for job in first} == {0.25}
    assert other.config.optim.lr == 0.5
    assert [[job.name for job in stage] for stage in stages(first)] == [
        ["sum", "other"],
        ["again"],
        ["last"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {train.init_from: '{b}'}", "'a' needs 'b', which is not there"),
        ("a: {train.init_from: '{b}'}\nb: {train.init_from: '{a}'}", "need each other: "),
        ("a: [1]", "a is not a mapping"),
        ("a: {optim.lrr: 1}", r"variant 'a': [^$]*optim.lrr"),
        ("a: {}\na: {}", "a stands twice"),
        ("a: {seed: 3}\na-seed6: {}", "two runs of the sweep would share"),
    ],
)
def test_variants_that_cannot_be_are_refused(config, tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan_variants(str(config), [], str(tmp_path / "wrong.yaml"), 2)


def test_what_a_variant_sets_cannot_be_typed_for_all_of_them(config, tmp_path):
    path = tmp_path / "ways.yaml"
    path.write_text("one: {}\ntwo: {optim.lr: 0.5}\n")
    with pytest.raises(UsageError, match=r"optim.lr is typed for all .* sets it in: two"):
        plan_variants(str(config), ["optim.lr=1"], str(path), 1)


def test_a_classifier_is_swept_in_variants_and_not_over_classes():
    with pytest.raises(UsageError, match="--variants FILE.yaml .shipped: classkd_cifar10"):
        plan("classkd_cifar10", [], ["all"], 1)


def test_what_needs_a_run_that_failed_is_not_started_and_says_so(variants):
    total, again, _, final = variants.jobs[:4]
    total.run.mkdir(parents=True)
    (total.run / "status.json").write_text('{"state": "failed", "reason": "no"}')
    runner = Runner([], StopRequest(variants.directory))  # without a place to run in
    outcome = runner(again)
    assert (outcome.code, outcome.reason) == (1, "sum failed")
    found = {run["category"]: run for run in write_table(variants)["missing"] if run["seed"] == 5}
    assert (found["again"]["state"], found["again"]["reason"]) == ("not started", "sum failed")
    assert found["last"]["reason"] == "again failed"
    assert found["other"]["reason"] is None

    (total.run / "status.json").write_text('{"state": "preempted"}')
    assert runner(again).code == Preempted.exit_code
    shutil.rmtree(total.run)  # left by Ctrl-C before it said anything
    assert runner(again).code == Preempted.exit_code
    finish(total)
    assert not again.waits_for() and final.waits_for() == [again]


def test_what_started_from_a_run_is_done_again_after_that_was_trained_anew(variants):
    total, again = variants.jobs[:2]
    finish(total)
    finish(again)
    assert again.state() == "scored"
    os.utime(total.run / "config.yaml", (1e9 + 1, 1e9 + 1))
    assert (total.state(), again.state()) == ("scored", "not scored")


def test_slurm_starts_what_is_needed_first_and_the_rest_when_that_succeeded(variants):
    told = submit(variants, None, [], dry_run=True)
    names = [[Path(word).stem for word in array if word.endswith(".yaml")] for array in told.arrays]
    assert names == [
        ["sum", "other", "sum-seed6", "other-seed6"],
        ["again"],
        ["again-seed6"],
        ["last"],
        ["last-seed6"],
    ]
    after = [[w for w in array if w.startswith("--dependency")] for array in told.arrays]
    assert after[0] == []
    assert after[1:3] == [["--dependency=afterok:ARRAY1_0"], ["--dependency=afterok:ARRAY1_2"]]
    assert after[3] == ["--dependency=afterok:ARRAY2_0"]
    assert "--kill-on-invalid-dep=yes" in told.arrays[1]
    assert "--dependency=afterany:" + ":".join(f"ARRAY{i}" for i in range(1, 6)) in told.collect
    finish(variants.jobs[0])
    again = submit(variants, None, [], dry_run=True).arrays[1]
    assert not any(word.startswith("--dependency") for word in again)


def test_a_dry_run_says_what_would_be_started_and_why(variants):
    finish(variants.jobs[0])
    lines = told(variants).splitlines()
    assert lines[0] == "1 of 8 runs are done"
    place = lines.index("again (not started), after sum:")
    assert [shlex.split(line)[3] for line in lines[place + 1 : place + 4]] == [
        "train",
        "score",
        "report",
    ]


def test_a_sweep_is_opened_again_where_its_directory_went(variants, tmp_path):
    finish(variants.jobs[0], image_auroc=0.5)
    variants.write(variants.jobs)
    before = write_table(variants)
    moved = variants.directory.rename(tmp_path / "else where")
    found = reopen(moved)
    after = write_table(found)
    assert [job.needs for job in found.jobs[:2]] == [(), (found.jobs[0],)]
    for table in (before, after):
        for run in table["runs"]:
            del run["directory"]
    assert after == before
    (moved / "table.json").write_text("{}")
    with pytest.raises(KdadError, match="damaged"):
        reopen(moved)
