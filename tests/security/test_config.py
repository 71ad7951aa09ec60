"""Configurations that would run something, or take everything."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from kdad_dist.config.load import dump, load, load_run
from kdad_dist.errors import ConfigError
from kdad_dist.sweep.plan import folder
from tests.needs import REPOSITORY
from tests.security.fuzz import fuzzed, survives

EVIL = "a' \"b $(touch pwned) `touch pwned` ;touch pwned\n&& touch pwned | touch pwned > pwned #"
"""Whatever reads this as a command leaves a file."""
YAML = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            *("2001-99-99", "9" * 5000, "1e999", ".nan", "0x", "1:70", "[" * 400, "{a: " * 400),
            *("&a [*a]", "&a {x: *a}", "!!int x", "? [a]: b", "!!binary x", "!!omap [a: b]"),
            *("{1: 2}", "{null: 1}", "{name: {}}", "{name: stfpm, 1: 2}", "\0", "'\\ud800'"),
        ]
    ),
)
KEYS = [*load("demo").__dataclass_fields__, "data.shards", "data.category", "optim.betas"]
KEYS += ["method.name", "method.teacher.layers", "train.steps", "score.quantile", "", "a.b.c"]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/object/new:subprocess.Popen [['touch', 'pwned']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!include /etc/passwd",
    ],
)
def test_yaml_builds_nothing_but_plain_values(tmp_path: Path, tag: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.yaml"
    file.write_text(f"name: {tag}\n")
    for words in ([file], ["demo", [f"name={tag}"]]):
        with pytest.raises(ConfigError, match="YAML"):
            load(*words)
    assert not (tmp_path / "pwned").exists()


def test_aliases_do_not_multiply(tmp_path: Path):
    laughs = "data: &a0 {x: 1}\n"
    laughs += "".join(f"k{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 60))
    lists = "l0: &b0 [lol]\n"
    lists += "".join(f"l{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 60))
    for text, said in ((laughs, "alias"), (f"{lists}data: {{category: *b59}}\n", "problems")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said) as raised:
            load(tmp_path / "c.yaml")
        assert len(str(raised.value)) < 30_000


@fuzzed
def test_no_override_brings_anything_but_an_error_that_a_user_understands(examples: int):
    words = st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=9), YAML)
    survives(2 * examples, lambda word: load("demo", [word]), words)


@fuzzed
def test_no_file_brings_anything_else(tmp_path: Path, examples: int):
    file = tmp_path / "c.yaml"

    def check(text: str) -> None:
        file.write_bytes(text.encode(errors="surrogatepass"))
        load(file)

    lines = st.builds("{}: {}\n".format, st.sampled_from(KEYS), YAML)
    survives(2 * examples, check, YAML | st.lists(lines, max_size=4).map("".join))


def test_what_was_written_of_a_configuration_reads_back_whatever_its_names(tmp_path: Path):
    found = load("demo", [f"name={yaml.safe_dump(EVIL)}", "track.group='!!python/name:os'"])
    (tmp_path / "config.yaml").write_text(dump(found))
    again = load_run(tmp_path)
    assert (again.name, again.track.group) == (EVIL, "!!python/name:os")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Programs that write down what they are called with, in place of srun and the like."""
    place = tmp_path / "bin"
    place.mkdir()
    note = f'printf "%s\\0" "$@" >> "{tmp_path}/$(basename "$0").words"\n'
    asked = f'[[ $1 == -c || $3 == --run-directory ]] && exec "{sys.executable}" "$@"\n'
    for name, before in (("srun", ""), ("scontrol", ""), ("python", asked)):
        (place / name).write_text(f"#!/bin/bash\n{before}{note}")
    for path in place.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return place


def words_of(tmp_path: Path, name: str) -> list[str]:
    return (tmp_path / f"{name}.words").read_text().split("\0")[:-1]


def script(tools: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = (
        os.environ
        | environment
        | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "KDAD_PYTHON": str(tools / "python"),
        }
    )
    return subprocess.run(
        ["bash", *map(str, words)],
        cwd=tools.parent,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


SLURM = {
    "SLURM_NNODES": "1",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "0",
    "KDAD_LAUNCH": str(REPOSITORY / "launch"),
    "KDAD_MODE": "cpu",
}


@pytest.mark.parametrize("name", ["train.sh", "score.sh"])
def test_a_launch_script_hands_on_every_word_as_it_is(tools: Path, tmp_path: Path, name: str):
    done = script(tools, REPOSITORY / "launch" / name, "demo", f"name={EVIL}", "--", "-x")
    assert done.returncode == 0, done.stderr
    assert words_of(tmp_path, "python")[-4:] == ["demo", f"name={EVIL}", "--", "-x"]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("variable", ["KDAD_PROCESSES", "KDAD_MACHINES", "KDAD_MODE"])
def test_a_number_of_the_environment_is_not_evaluated(tools: Path, tmp_path: Path, variable: str):
    done = script(tools, REPOSITORY / "launch/train.sh", "demo", **{variable: "a[$(touch pwned)]"})
    assert done.returncode == 2 and variable in done.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_jobs_hand_on_names_as_they_are_and_write_beside_the_run_alone(tools: Path, tmp_path: Path):
    output = f"runs/{folder(EVIL)}"
    file = tmp_path / f"{folder(EVIL)}.yaml"
    file.write_text(yaml.safe_dump({"output": output} | CONFIG))
    for job in ("train.sbatch", "sweep.sbatch"):
        settings = SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path)}
        done = script(tools, REPOSITORY / "slurm" / job, file, **settings)
        assert done.returncode == 0, done.stderr
    trained, swept, scored = (
        words[words.index("bash") + 3 :] for words in calls(words_of(tmp_path, "srun"))
    )
    assert trained == swept == [str(REPOSITORY / "launch/train.sh"), str(file)]
    assert scored[:2] == [str(REPOSITORY / "launch/score.sh"), output]
    assert words_of(tmp_path, "python")[-2:] == ["report", output]
    assert (tmp_path / f"{output}.log").is_file()
    assert not list(tmp_path.rglob("pwned"))


CONFIG = {"name": EVIL, "data": {"shards": "x"}, "optim": {"lr": 1.0}, "train": {"steps": 1}}


def calls(words: list[str]) -> list[list[str]]:
    """The words of each call of srun, which begins with an option that the others lack."""
    starts = [i for i, word in enumerate(words) if word.startswith("--kill-on-bad-exit")]
    return [words[i:j] for i, j in zip(starts, [*starts[1:], len(words)], strict=True)]
