"""What `kdad status` makes of the files that runs keep."""

import io
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import cast

import psutil
import pytest
from rich.console import Console

from kdad_dist import files
from kdad_dist.errors import DataError, Preempted, UsageError
from kdad_dist.files import Holder, write_json
from kdad_dist.runtime.manifest import VERSION, file_entry, replace_manifest
from kdad_dist.runtime.status import Status
from kdad_dist.status.survey import SILENT, judge, look, losses, survey, tally
from kdad_dist.status.text import shown
from tests.helpers_run import make_run

FREE, NOBODY = Holder(False, "pid 7 on here"), Holder(False, "")
HELD, AWAY = Holder(True, "pid 7 on here"), Holder(False, "pid 7 on elsewhere")


@pytest.mark.parametrize(
    ("said", "holder", "silent", "is_new", "state", "reason"),
    [
        ("finished", FREE, 9e9, False, "finished", None),
        ("preempted", AWAY, 9e9, False, "preempted", None),
        ("running", HELD, 1, False, "running", None),
        ("running", HELD, SILENT + 1, False, "stale", "does it hang"),
        ("running", FREE, 1, False, "stale", "pid 7 on here has ended without a word"),
        ("running", AWAY, 1, False, "running", None),
        ("running", AWAY, SILENT + 1, False, "stale", "nothing was written for 30 min"),
        ("failed", HELD, SILENT + 1, True, "running", "pid 7 on here is starting"),
        ("finished", HELD, 1, False, "finished", None),
        (None, NOBODY, 1, False, "unknown", "missing or damaged"),
        ("dancing", NOBODY, 1, False, "unknown", "missing or damaged"),
        (["running"], NOBODY, 1, False, "unknown", "missing or damaged"),
    ],
)
def test_who_holds_a_run_and_when_it_last_wrote_correct_what_it_says(
    said, holder, silent, is_new, state, reason
):
    found = judge({"state": said}, holder, silent, is_new, here="here")
    assert found[0] == state
    assert (reason or "") in (found[1] or "")
    assert (found[1] is None) == (reason is None)


def test_the_lock_of_a_directory_is_seen_without_keeping_others_out(tmp_path):
    assert files.holder(tmp_path) == Holder(False, "")
    with files.exclusive(tmp_path):
        found = files.holder(tmp_path)
        assert found.holds
        assert found.text.startswith(f"pid {os.getpid()} on")
    assert not files.holder(tmp_path).holds
    with files.exclusive(tmp_path):
        pass


def test_the_result_is_of_the_checkpoint_that_the_run_names(tmp_path):
    run = make_run(tmp_path / "run")
    selected = json.loads((run / "metrics.json").read_text())["mean"]
    write_json(run / "metrics-last.json", {"mean": {"image_auroc": 0.1234}})
    assert look(run, content=False).metrics == selected
    config = (run / "config.yaml").read_text()
    with (run / "config.yaml").open("a") as file:
        file.write("score: {checkpoint: last}\n")
    assert "AUROC 0.1234" in shown([look(run, content=False)], run).plain
    (run / "config.yaml").write_bytes(b"\xff: [")
    assert look(run, content=False).metrics == selected, "a damaged file is no obstacle"
    (run / "config.yaml").write_text(config)
    (run / "metrics.json").unlink()
    assert "AUROC 0.1234" in shown([look(run, content=False)], run).plain


def sweep(folder: Path) -> None:
    """A sweep of three classes, of which one has failed and one has not been started."""
    make_run(folder / "bottle")
    make_run(folder / "cable", scored=False)
    write_json(folder / "cable/status.json", {"state": "failed", "reason": "DataError: no disk"})
    for name in ("sweep", "bottle", "cable", "zipper"):
        (folder / f"{name}.yaml").touch()


def test_every_run_below_a_folder_is_found_and_a_sweep_kept_together(tmp_path):
    make_run(tmp_path / "alone")
    sweep(tmp_path / "deep/down/many")
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "not-a-run/config.yaml").touch()
    (tmp_path / ".hidden").mkdir()
    make_run(tmp_path / ".hidden/run")
    found = {Path(run.run).name: run for run in survey(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {
        "alone": "finished",
        "bottle": "finished",
        "cable": "failed",
        "zipper": "not started",
    }
    assert {run.sweep for run in found.values()} == {None, str(tmp_path / "deep/down/many")}
    assert tally(list(found.values())) == "1 failed, 1 not started, 2 finished"
    assert [run.run for run in survey(tmp_path / "alone")] == [str(tmp_path / "alone")]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_where_there_is_no_run_that_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there is no"):
        survey(tmp_path / name)


def test_step_pace_and_remaining_time_are_those_of_the_last_complete_line(tmp_path):
    run = make_run(tmp_path / "run")
    write_json(run / "status.json", {"state": "running", "step": 300, "steps": 400})
    with (run / "metrics.jsonl").open("a") as file:
        line = {"step": 300, "samples_seen": 2400, "loss": 0.5, "images_per_second": 16.0}
        file.write(json.dumps(line) + "\n")
        file.write('{"step": 300, "val_loss": 9}\n{"step": 301, "lo')
    found = look(run, content=False)
    assert (found.loss, found.images_per_second) == (0.5, 16.0)
    assert found.seconds_left == 100 * 8 / 16
    assert found.metrics and found.metrics["image_auroc"] > 0.9


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\n[1]\n3\n", b'{"step": 1}\n', b"x" * 100_000])
def test_a_log_without_losses_is_no_obstacle(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert losses(tmp_path / "metrics.jsonl") == []


def test_of_two_networks_in_turns_the_loss_is_the_students_and_the_pace_that_of_both(tmp_path):
    run = make_run(tmp_path / "run")
    write_json(run / "status.json", {"state": "running", "step": 2, "steps": 4})
    pace = {"samples_seen": 8, "images_per_second": 4.0}
    duel = {"step": 2, "loss": 0.7, "discriminator": 0.7, **pace}
    before = {"step": 1, "loss": 3.0, **pace, "images_per_second": 1.0}
    for lines, loss in (([duel], None), ([before, duel], 3.0)):
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = look(run, content=False)
        assert (found.loss, found.images_per_second) == (loss, 4.0)


def checkpoint(run: Path, step: int) -> Path:
    path = run / f"checkpoints/step_{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(1000))
    entries = {"weights": file_entry(path / "weights")}
    body = {"format": "dcp", "samples_seen": step, "metrics": {}, "identity": {}, "files": entries}
    replace_manifest(path, {"version": VERSION, "step": step, **body})
    return path


def test_a_checkpoint_counts_if_its_files_are_there_and_on_request_unchanged(tmp_path):
    run = make_run(tmp_path / "run")
    assert look(run, content=True).checkpoint is None
    paths = {step: checkpoint(run, step) for step in (100, 200, 300, 400)}
    (paths[400] / "manifest.json").unlink()
    (paths[300] / "weights").write_bytes(bytes(999))
    (paths[200] / "weights").write_bytes(bytes(999) + b"1")
    (run / "checkpoints/.step_00000500.1234.partial").mkdir()
    found = look(run, content=False)
    assert found.checkpoint == 200
    assert "manifest.json is missing" in found.damaged[0]
    assert "999 bytes instead of 1000" in found.damaged[1]
    found = look(run, content=True)
    assert found.checkpoint == 100
    assert "does not match its sha256" in found.damaged[2]


def test_a_run_is_no_less_far_than_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    for noted, step in ((50, 63), (70, 70)):
        write_json(run / "status.json", {"state": "running", "step": noted, "steps": 900})
        checkpoint(run, 63)
        found = look(run, content=False)
        assert (found.step, found.checkpoint) == (step, 63)
        shutil.rmtree(run / "checkpoints")


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "19", "ARRAY_JOB_ID": "", "SLURM_ARRAY_JOB_ID": "18",
          "SLURM_ARRAY_TASK_ID": "0"}, "18_0"),
    ],
)  # fmt: skip
def test_the_job_is_named_as_slurm_names_it(tmp_path, monkeypatch, variables, job):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Status(tmp_path, 9, writes=True).write("running")
    assert look(tmp_path, content=False).job == job


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", None),
        (Preempted("asked to stop", "start again"), "preempted", "asked to stop"),
        (KeyboardInterrupt(), "preempted", "interrupted"),
        (DataError("no disk", "mend it"), "failed", "DataError: no disk\n  -> mend it"),
    ],
)
def test_the_last_word_of_a_run_is_told(tmp_path, error, state, reason):
    run = make_run(tmp_path / "run")
    with suppress(BaseException), files.exclusive(run), Status(run, 9, writes=True).outcome():
        assert look(run, content=False).state == "running"
        if error:
            raise error
    found = look(run, content=False)
    assert (found.state, found.reason, found.process) == (state, reason, None)


def test_a_scoring_is_seen_at_work_and_when_it_was_left(tmp_path):
    run = make_run(tmp_path / "run", scored=False)
    (run / "scores-last.partial").mkdir()
    with files.exclusive(run / "scores-last.partial"):
        found = look(run, content=False)
        assert found.state == "scoring"
        assert found.process == f"pid {os.getpid()} on {os.uname().nodename}"
        assert found.reason == f"{found.process} fills scores-last.partial"
    found = look(run, content=False)
    assert (found.state, found.process) == ("finished", None)
    assert "the same `kdad score` goes on with it" in (found.reason or "")


HOSTILE = "\x1b[2J[bold]a\n\u202eb\r"
SHOWN = r"\x1b[2J[bold]a\n\u202eb\r"


def test_no_name_steers_the_terminal_or_is_taken_for_markup(tmp_path):
    sweep(tmp_path / HOSTILE)
    make_run(tmp_path / HOSTILE / f"x{HOSTILE}", scored=False)
    status = {"state": "failed", "reason": f"no file {HOSTILE}", "job": HOSTILE}
    write_json(tmp_path / HOSTILE / f"x{HOSTILE}/status.json", status)
    said = text(tmp_path)
    assert not set("\x1b\r\u202e") & set(said)
    assert f"sweep {tmp_path}/{SHOWN}: 2 failed" in said
    assert f"{tmp_path}/{SHOWN}/x{SHOWN}  " in said and f"  {SHOWN}\n" in said
    assert r"    no file \x1b[2J[bold]a" in said


def text(folder: Path, **console: bool) -> str:
    screen = Console(file=io.StringIO(), width=40, **console)
    screen.print(shown(survey(folder), folder), soft_wrap=True)
    return cast(io.StringIO, screen.file).getvalue()


def test_a_person_sees_one_line_for_each_run_and_why_it_stopped(tmp_path):
    sweep(tmp_path / "many")
    make_run(tmp_path / "alone")
    first, header, *lines = text(tmp_path).splitlines()
    assert first == "4 runs: 1 failed, 1 not started, 2 finished"
    assert header.split()[:4] == ["state", "run", "step", "loss"]
    assert lines[0].split()[:3] == ["finished", str(tmp_path / "alone"), "400/400"]
    assert "AUROC 0.97" in lines[0]
    assert lines[1].startswith(f"sweep {tmp_path / 'many'}: 1 failed, 1 not started, 1 finished")
    assert lines[3].split()[0] == "failed"
    assert lines[4] == "    DataError: no disk"
    assert lines[5].split() == ["not", "started", str(tmp_path / "many/zipper")]


def test_one_run_of_a_sweep_is_not_told_as_the_sweep(tmp_path):
    sweep(tmp_path / "many")
    first, _, belongs, line = text(tmp_path / "many/bottle").splitlines()
    assert first == "1 run: 1 finished"
    assert belongs == f"of sweep {tmp_path / 'many'}"
    assert line.split()[:2] == ["finished", str(tmp_path / "many/bottle")]
    for name in ("cable", "zipper"):
        (tmp_path / f"many/{name}.yaml").unlink()
    shutil.rmtree(tmp_path / "many/cable")
    for asked in (tmp_path, tmp_path / "many"):
        assert text(asked).splitlines()[2] == f"sweep {tmp_path / 'many'}: 1 finished"


def test_states_are_coloured_on_a_terminal_unless_that_is_refused(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    assert "\x1b[32mfinished" in text(tmp_path, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in text(tmp_path, force_terminal=True)
    assert "\x1b" not in text(tmp_path)


def test_of_long_runs_only_the_end_is_read(tmp_path):
    for i in range(20):
        run = tmp_path / f"run{i}"
        run.mkdir()
        write_json(run / "status.json", {"state": "running", "step": 1, "steps": 2})
        (run / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' * 40_000)
    here = psutil.Process()
    before = here.io_counters().read_chars
    assert [run.loss for run in survey(tmp_path)] == [1.0] * 20
    assert here.io_counters().read_chars - before < 20 * 100_000
