"""`kdad` in a shell: completion, slips of the finger, colours, Ctrl-C, and how soon it answers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import make_mvtec
from tests.kdad import Launched, succeeds, until
from tests.needs import REPOSITORY

WORDS = "import sys; sys.argv[0] = 'kdad'; from kdad_dist.cli import main; main()"


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WORDS, *words]
    environment = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR"}}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment | variables, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kdad do", {"doctor"}),
        ("kdad train stfpm_m", {"stfpm_mvtec"}),
        ("kdad train --dry", {"--dry-run"}),
    ],
)
def test_a_shell_completes_verbs_recipes_and_options(line, offered):
    count = str(len(line.split()) - 1)
    done = shell(_KDAD_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=count)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize(
    ("words", "meant"), [(["trian"], "train"), (["status", "--verfy"], "--verify")]
)
def test_a_slip_of_the_finger_is_answered_with_what_was_meant(words, meant):
    done = shell(*words)
    assert done.returncode == 2
    assert f"{meant}" in done.stderr
    assert "\x1b" not in done.stderr


def test_what_is_piped_has_no_colours_and_only_the_document_on_stdout(tmp_path):
    done = shell("status", str(tmp_path), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "\x1b" not in done.stderr
    assert "there is no run" in done.stderr


def test_help_needs_no_torch():
    code = WORDS.replace("main()", "sys.argv[1:] = ['--help']\n")
    code += "try:\n    main()\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr


def read_forever() -> None:
    """Has every shard take a while to verify."""
    import time

    from kdad_dist.data import verify

    def slow(*_: object):
        Path(sys.argv[2], "begun").touch()
        time.sleep(1)
        return iter(())

    verify._shard_faults = slow


@pytest.mark.launch
def test_a_verification_is_left_by_ctrl_c(tmp_path):
    make_mvtec(tmp_path / "images", train=6)
    succeeds("pack", tmp_path / "images", tmp_path / "shards", "--size", 32)
    launched = Launched(["verify", tmp_path / "shards"], 1, read_forever)
    until(launched, (tmp_path / "shards/begun").exists)
    launched.kill(signal.SIGINT)
    outcome = launched.wait(60)
    assert outcome.codes == [130], outcome.text
    assert "kdad: interrupted" in outcome.text and "Traceback" not in outcome.text
