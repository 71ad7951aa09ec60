"""Every benchmark can be started; `make soak` runs them at a toy's size (tests/soak)."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from tests.needs import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "benchmarks").glob("*.py"))
ANOMALIB = ("peer_metrics.py", "peer_stfpm.py")
"""Run in an environment of their own, which has it."""


class Understood(Exception):
    """What a script was told has been parsed."""


def takes_options(script: Path) -> bool:
    return ".parse_args(" in script.read_text(encoding="utf-8")


def started(script: Path, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Imports a script and, where it has options, lets it parse some; nothing is measured.

    Raises:
        SystemExit: it does not understand them, or was asked for `--help`.
    """

    def parse(parser: argparse.ArgumentParser) -> None:
        original(parser)
        raise Understood

    original = argparse.ArgumentParser.parse_args
    before = set(sys.modules)
    with patch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        patched.setattr(sys, "argv", [str(script), *words])
        patched.syspath_prepend(str(script.parent))
        try:
            names = runpy.run_path(str(script), run_name="started")
            if takes_options(script):
                names["main"]()
        except Understood:
            pass
        finally:
            for name in set(sys.modules) - before:
                if (script.parent / f"{name}.py").is_file():
                    del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_benchmark_is_imported_and_tells_its_options(script: Path, monkeypatch, capsys):
    if script.name in ANOMALIB:
        compile(script.read_text(encoding="utf-8"), script.name, "exec")
        return
    try:
        started(script, ["--help"], monkeypatch)
    except SystemExit as ended:
        assert ended.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {script.name}")
    else:
        assert not takes_options(script)


def test_what_a_benchmark_does_not_know_is_refused(monkeypatch, capsys):
    script = REPOSITORY / "benchmarks/modes.py"
    started(script, ["--method", "tiny", "--steps", "4"], monkeypatch)
    with pytest.raises(SystemExit):
        started(script, ["--stops", "4"], monkeypatch)
    assert "unrecognized arguments: --stops 4" in capsys.readouterr().err
