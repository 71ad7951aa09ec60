"""What is installed is the same as what is checked out: a wheel, used far from the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.needs import REPOSITORY

PARTS = ("kdad_dist", "configs", "launch", "slurm", "setup.cfg", "pyproject.toml", "README.md")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment, `venv`, that holds the wheel and sees our libraries."""
    folder = tmp_path_factory.mktemp("a b")
    source = folder / "source"
    source.mkdir()
    for part in (*PARTS, "LICENSE"):
        if (REPOSITORY / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / part, source / part, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / part, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    built = run(*build, source, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    shutil.rmtree(source)

    made = run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    assert made.returncode == 0, made.stderr
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", wheel]
    installed = run(folder / "venv/bin/python", *install, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return folder


def installed_package(elsewhere: Path) -> Path:
    (package,) = (elsewhere / "venv" / "lib").glob("python*/site-packages/kdad_dist")
    return package


def test_the_installed_command_explains_itself(elsewhere: Path) -> None:
    result = run(elsewhere / "venv/bin/kdad", "--help", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    for verb in ("demo", "pack", "verify", "train", "score", "sweep", "report", "export"):
        assert verb in result.stdout


def test_a_shipped_recipe_is_found_by_name_outside_the_repository(elsewhere: Path) -> None:
    show = "from kdad_dist.config.load import load; print(load('stfpm_mvtec').name)"
    result = run(elsewhere / "venv/bin/python", "-c", show, cwd=elsewhere)
    assert (result.returncode, result.stdout) == (0, "stfpm-mvtec\n"), result.stderr


def test_the_wheel_carries_recipes_launch_scripts_and_slurm_templates(elsewhere: Path) -> None:
    package = installed_package(elsewhere)
    for inside, outside in (("recipes", "configs"), ("launch", "launch"), ("slurm", "slurm")):
        folder = REPOSITORY / outside
        expected = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        found = {
            path.relative_to(package / inside)
            for path in (package / inside).rglob("*")
            if path.is_file() and path.suffix not in {".py", ".pyc"}
        }
        assert found == expected
    assert (package / "py.typed").is_file()  # so that the types of a program's calls are checked


@pytest.mark.launch
def test_the_installed_launch_script_leaves_with_the_programs_own_exit_code(
    elsewhere: Path,
) -> None:
    result = run(
        installed_package(elsewhere) / "launch" / "train.sh",
        "no_such_recipe",
        cwd=elsewhere,
        KDAD_PYTHON=str(elsewhere / "venv/bin/python"),
        KDAD_MODE="cpu",
    )
    assert result.returncode == 2, result.stderr
    assert "no_such_recipe" in result.stderr
