"""`kdad` in a shell: completion, slips of the finger, colours, Ctrl-C, and how soon it answers."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import shellingham

from kdad_dist.cli.app import main
from kdad_dist.runtime.watch import is_gone
from tests.helpers import make_mvtec
from tests.kdad import Launched, succeeds, until
from tests.launcher import wait_for
from tests.needs import REPOSITORY

WORDS = "import sys; sys.argv[0] = 'kdad'; from kdad_dist.cli.app import main; main()"


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


def test_a_completion_is_of_kdad_however_that_was_started(tmp_path):
    words = [sys.executable, "-m", "kdad_dist", "--install-completion"]
    subprocess.run(
        ["bash", "-c", f"{shlex.join(words)}; exit $?"],
        cwd=REPOSITORY,
        env=os.environ | {"HOME": str(tmp_path)},
        check=True,
    )
    [written] = (tmp_path / ".bash_completions").iterdir()
    assert written.name == "kdad.sh"
    assert "_KDAD_COMPLETE=complete_bash" in written.read_text()
    done = shell("--install-completion", "zsh")
    assert done.returncode == 2
    assert "takes no name" in done.stderr


@pytest.mark.parametrize(
    ("name", "part", "answer"),
    [("zsh", "compdef _kdad_completion kdad", '"doctor"'), ("fish", "--command kdad", "doctor")],
)
def test_shells_that_need_not_be_here_get_a_script_and_answers(
    monkeypatch, capsys, name, part, answer
):
    monkeypatch.setattr(shellingham, "detect_shell", lambda *_: (name, f"/bin/{name}"))
    monkeypatch.setattr(sys, "argv", ["kdad", "--show-completion"])
    with pytest.raises(SystemExit) as left:
        main()
    script = capsys.readouterr().out
    assert left.value.code == 0 and part in script
    assert f"_KDAD_COMPLETE=complete_{name}" in script
    monkeypatch.setattr(sys, "argv", ["kdad"])
    monkeypatch.setenv("_KDAD_COMPLETE", f"complete_{name}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "kdad do")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        main()
    assert answer in capsys.readouterr().out


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
    left_by_ctrl_c(launched)


def left_by_ctrl_c(launched: Launched) -> None:
    outcome = launched.wait()
    assert outcome.codes == [130], outcome.text
    assert "kdad: interrupted" in outcome.text and "Traceback" not in outcome.text, outcome.text


def write_forever() -> None:
    """Has an export take a while between its file and the manifest beside it."""
    import time

    from kdad_dist import files

    write = files.write_bytes

    def slow(path: Path, *arguments: Any) -> None:
        path.with_name("begun").touch()
        time.sleep(300)  # Ctrl-C ends it
        write(path, *arguments)

    files.write_bytes = slow


@pytest.mark.launch
def test_an_export_that_is_left_by_ctrl_c_leaves_no_half_of_a_file(runs, tmp_path):
    run = shutil.copytree(runs / "stfpm", tmp_path / "run")
    launched = Launched(["export", run], 1, write_forever)
    until(launched, (run / "export/begun").exists)
    launched.kill(signal.SIGINT)
    left_by_ctrl_c(launched)
    assert [path.name for path in (run / "export").iterdir()] == ["begun"]
    succeeds("export", run)


def connect_only() -> None:
    """In a group of processes of its own, as a shell starts it; other checks take a while."""
    from kdad_dist.doctor import text as doctor_text

    os.setsid()
    doctor_text.CHECKS = doctor_text.CHECKS[-1:]


@pytest.mark.launch
def test_a_doctor_that_is_left_by_ctrl_c_leaves_no_process_behind(monkeypatch):
    monkeypatch.setenv("KDAD_MODE", "cpu")
    launched = Launched(["doctor", "--launch", 2], 1, connect_only)
    doctor = psutil.Process(launched.ranks[0].pid)

    def ranks() -> int:
        lines = []
        for process in doctor.children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                lines.append(process.cmdline())
        return sum("kdad_dist" in x and "kdad_dist.runtime.launcher" not in x for x in lines)

    until(launched, lambda: ranks() == 2)
    below = doctor.children(recursive=True)
    os.killpg(doctor.pid, signal.SIGINT)
    left_by_ctrl_c(launched)
    wait_for(lambda: all(is_gone(process.pid) for process in below))
