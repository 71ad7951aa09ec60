"""How the commands of a sweep's runs end, and what the sweep makes of it."""

import sys

from kdad_dist.errors import Preempted
from kdad_dist.runtime.stopping import StopRequest
from kdad_dist.sweep import local
from kdad_dist.sweep.local import Outcome, Runner, tell
from kdad_dist.sweep.plan import plan


def test_a_command_that_ends_without_a_word_has_failed_unless_ctrl_c_reached_it_too(
    config, monkeypatch
):
    sweep = plan(str(config), [], ["all"], 1)
    sweep.write([])
    broken = {"score": [sys.executable, "-c", "raise RecursionError('half an import')"]}
    monkeypatch.setattr(local, "commands", lambda job: broken)
    runner = Runner([{}], StopRequest(sweep.directory))
    outcome = runner(sweep.jobs[0])
    assert outcome.code == 1 and "exit code 1" in outcome.reason

    def interrupted(*arguments):
        runner.stop.reason = "received SIGINT"
        return follow(*arguments)

    follow = runner.follow
    monkeypatch.setattr(runner, "follow", interrupted)
    for script, code, reason_ in (
        ("raise RecursionError('half an import')", Preempted.exit_code, ""),
        ("import os; os.abort()", Preempted.exit_code, ""),
        ("raise SystemExit('kdad: no space')", 1, "no space"),
    ):
        runner.stop.reason = None
        broken["score"][-1] = script
        outcome = runner(sweep.jobs[0])
        assert (outcome.code, outcome.reason) == (code, reason_)
    broken["report"] = [*broken.pop("score")[:-1], "import os; os.abort()"]
    assert runner(sweep.jobs[0]).code == 0, "it is scored, and counts as done"


SAY_GPUS = """
import os, sys, time
from pathlib import Path
here = Path(sys.argv[1])
here.with_suffix(".here").touch()
end = time.monotonic() + 120
while len(list(here.parent.glob("*.here"))) < 2 and time.monotonic() < end:
    time.sleep(0.02)
print("GPUs", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
"""


def test_runs_that_are_under_way_at_once_see_gpus_of_their_own(config, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.setattr(
        local, "commands", lambda job: {"train": [sys.executable, "-Sc", SAY_GPUS, str(job.run)]}
    )
    sweep = plan(str(config), [], ["all"], 1)
    outcomes = local.run_all(sweep, at_once=2)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    seen = {job.log.read_text().splitlines()[-1] for job in sweep.jobs}
    assert seen == {"GPUs 4", "GPUs 6,7"}


def test_the_log_of_a_run_that_failed_is_named_where_there_is_one(config, caplog):
    [job, *_] = plan(str(config), [], ["all"], 1).jobs
    tell(Outcome(job, 1, "its teacher failed"))
    job.log.parent.mkdir(parents=True)
    job.log.touch()
    tell(Outcome(job, 1, "no space"))
    never, begun = caplog.messages
    assert never.endswith("failed: its teacher failed") and begun.endswith(f"no space\n  {job.log}")
