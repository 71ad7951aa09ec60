"""A request to stop is heeded wherever a training is, and the same command then goes on."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kdad_dist.runtime.stopping import LOOK_EVERY, MARK
from tests.integration.test_training import config as config
from tests.kdad import Launched, lines, succeeds, until, weights
from tests.launcher import wait_for

pytestmark = pytest.mark.launch


def output() -> Path:
    [run] = [word.removeprefix("output=") for word in sys.argv if word.startswith("output=")]
    return Path(run)


def said(name: str) -> Path:
    """A file beside the run, by which a hook says how far it is, or is told to go on."""
    return Path(f"{output()}.{name}")


def read_slowly() -> None:
    """Has a cache fill, or a shard be read, until the other process asks to stop, and longer."""
    from kdad_dist.data import reader, stream, threads
    from kdad_dist.runtime.stopping import StopRequest

    def poll_and_say(self):
        said(f"heeds{os.environ['RANK']}").touch()
        return poll(self)

    def slow(*arguments):
        with said("reading").open("a") as file:
            file.write("1")
        wait_for(said("asked").exists)
        if os.environ["RANK"] == "0":
            wait_for((output() / MARK).exists)
        time.sleep(LOOK_EVERY)
        return check(*arguments)

    poll, check = StopRequest.poll, reader.check_member
    StopRequest.poll = poll_and_say
    reader.check_member = stream.check_member = slow
    threads.cpu_count = lambda: 2  # images that are read at a time


def validate_and_save_slowly() -> None:
    """Has a validation last until somebody asks to stop, and the next save until they insist."""
    from kdad_dist.methods.stfpm import Stfpm
    from kdad_dist.runtime.tensors import Tensors

    forward, write = Stfpm.forward, Tensors.write

    def slow_forward(self, batch):
        if not self.training:
            said("validating").touch()
            wait_for(said("asked").exists)
        return forward(self, batch)

    def slow_write(self, *arguments):
        if said("asked").exists():
            said("saving").touch()
            wait_for(said("signalled").exists)
        return write(self, *arguments)

    Stfpm.forward, Tensors.write = slow_forward, slow_write


@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_a_run_stopped_while_it_reads_its_data_leaves_nothing_half_made(
    config, tmp_path, monkeypatch, access
):
    monkeypatch.setenv("KDAD_CACHE", str(tmp_path / "cache"))
    run, reading = tmp_path / "run", tmp_path / "run.reading"
    words = ["train", config, f"output={run}", f"data.access={access}", "train.steps=3"]
    launched = Launched(words, 2, first=read_slowly)
    heeds = tmp_path / "run.heeds1"  # before, a signal would kill it
    until(launched, lambda: reading.exists() and heeds.exists())
    launched.kill(signal.SIGTERM, only=1)  # which may wait for the other one to fill
    (tmp_path / "run.asked").touch()
    outcome = launched.wait()
    assert reading.stat().st_size < 12, "waited for all images"
    assert outcome.codes == [75, 75], outcome.text
    assert "start the same command again" in outcome.text
    assert "Traceback" not in outcome.text
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 0)
    assert not list(run.glob("checkpoints/*"))
    assert not [path for path in tmp_path.glob("cache/*/*") if path.suffix != ".lock"]
    succeeds(*words)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not (run / "stopped.txt").exists()


def test_a_validation_that_was_left_is_made_up_for_and_no_signal_disturbs_the_save(
    config, tmp_path
):
    more = ["data.val_fraction=0.5", "train.batch_size=2", "train.check_every=1", "train.steps=8"]
    words = {name: ["train", config, f"output={tmp_path / name}", *more] for name in ("a", "b")}
    succeeds(*words["a"], processes=2)
    run = tmp_path / "b"
    launched = Launched(words["b"], 2, first=validate_and_save_slowly)
    until(launched, (tmp_path / "b.validating").exists)
    launched.kill(signal.SIGTERM, only=1)
    (tmp_path / "b.asked").touch()
    until(launched, (tmp_path / "b.saving").exists)
    for _ in range(3):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            launched.kill(number)
        time.sleep(0.05)  # so that the next ones do not fall together with these
    (tmp_path / "b.signalled").touch()
    outcome = launched.wait()
    assert outcome.codes == [75, 75], outcome.text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert status["step"] not in lines(run, "val_loss")
    manifest = run / f"checkpoints/step_{status['step']:08d}/manifest.json"
    assert "val_loss" not in json.loads(manifest.read_text())["metrics"]
    succeeds(*words["b"], processes=2)
    assert lines(run) == lines(tmp_path / "a")
    assert lines(run, "val_loss") == lines(tmp_path / "a", "val_loss")
    assert weights(run) == weights(tmp_path / "a")
    kept = [{p.name for p in (tmp_path / name).glob("checkpoints/step_*")} for name in "ab"]
    assert kept[0] == kept[1], "another checkpoint is the best"
