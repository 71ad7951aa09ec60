"""What the documents tell a reader to type exists, and their pictures are those of the code."""

import io
import re
import shlex
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import typer

from kdad_dist.cli.app import app
from kdad_dist.config.load import load, recipe_names
from kdad_dist.config.methods import MethodConfig
from kdad_dist.config.run import RunConfig
from tests.architecture.test_benchmarks import started
from tests.architecture.test_layers import LAYERS
from tests.architecture.test_project import keys
from tests.documents import BLOCK, DOCUMENTS, FOUND
from tests.needs import REPOSITORY
from tests.tiny import METHODS

VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
Misuse: Any = typer.BadParameter.__base__
"""What typer raises of words that a verb does not understand."""
KEYS = {key for key, _ in keys(RunConfig)}
SECTIONS = {key.rpartition(".")[0] for key in KEYS}
EXTRAS = re.findall(r"^(\w+) =$", (REPOSITORY / "setup.cfg").read_text(), re.MULTILINE)
OTHERS = [
    ["python", "-m"],
    ["wandb", "sync"],
    ["wandb", "login"],
    ["hf", "download"],
    [".venv/bin/pre-commit", "install"],
]
"""What programs of others are asked for; they know best whether it is understood."""
TARGETS = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def typed(text: str) -> list[str]:
    """The words after the assignments, with something for each placeholder."""
    text = re.sub(r"\.\.\.|(?<!=)\[([^\[\]]*)\]", r" \1 ", text)  # [optional], but not KEY=[1,2]
    words = shlex.split(text.replace("(", " ").replace(")", " "))
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    words = [re.sub(r"(?<![^=])[nNS]$", "2", word) for word in words]
    if "--set" not in words:
        words = [word for word in words if word != "a.b=c"]
    return ["stfpm_mvtec" if word == "CONFIG" else word for word in words]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_a_document_names_would_be_understood(path: Path):
    name, wrong = str(path.relative_to(REPOSITORY)), []
    for command in FOUND:
        if command.where == name:
            try:
                understood(typed(command.text), command.whole)
            except (AssertionError, ValueError, Misuse) as error:
                wrong.append(f"{command}\n    {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.suffix == ".md"], ids=lambda p: p.name)
def test_a_block_that_is_not_typed_says_what_it_is(path: Path):
    languages = {language for language, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
    assert languages <= {"", "text", "python", "yaml", "mermaid"}


def test_commands_are_found_at_all():
    assert len(FOUND) > 100
    assert any(command.text.startswith("kdad sweep") and command.whole for command in FOUND)
    with pytest.raises(AssertionError):
        understood(["kdad", "trian", "demo"], True)
    with pytest.raises(AssertionError):
        understood(["kdad", "train", "demo", "train.epoch=3"], True)
    with pytest.raises(Misuse, match="sise"):
        understood(["kdad", "pack", "a", "b", "--sise", "3"], True)
    for words in ("export KDAD_PROCESS=2", "pip install 'kdad_dist[exports]'", "curl x"):
        with pytest.raises(AssertionError):
            understood(typed(words), True)
    with pytest.raises(AssertionError, match="unrecognized arguments: --nodes"):
        understood(["benchmarks/modes.py", "--step", "3", "--nodes"], True)


def understood(words: list[str], whole: bool) -> None:
    program, *rest = words
    match program:
        case "kdad" if rest:
            verb(rest[0], rest[1:], whole)
        case "make":
            targets = [word for word in rest if "=" not in word]
            assert set(targets) <= set(TARGETS), f"no such target: {targets}"
        case "sbatch":
            job = next((i for i, word in enumerate(rest) if word.endswith(".sbatch")), None)
            if job is not None and rest[job].startswith("slurm/"):
                script(rest[job], rest[job + 1 :], whole)
        case "accelerate" if "kdad_dist" in rest:
            file = rest[rest.index("--config_file") + 1]
            assert (REPOSITORY / file).is_file(), file
            name, *others = rest[rest.index("kdad_dist") + 1 :]
            verb(name, others, whole)
        case "python" if rest[0].startswith("benchmarks/"):
            benchmark(rest[0], rest[1:], whole)
        case _ if program.startswith("benchmarks/"):
            benchmark(program, rest, whole)
        case "export":
            known = (REPOSITORY / "launch/environment.sh").read_text(encoding="utf-8")
            assert all(re.search(rf"\b{word.partition('=')[0]}\b", known) for word in rest), rest
        case "pip":
            package, extra = rest[-1].split()  # of package[extra]
            assert package == "kdad_dist" and extra in EXTRAS, f"no such extra: {extra}"
        case ".ci/run":
            assert (REPOSITORY / program).is_file()
        case _ if program.endswith(".sh"):
            script(program, rest, whole)
        case _:
            assert words[:2] in OTHERS or program == "accelerate", "a program of nobody's"


def benchmark(path: str, words: list[str], whole: bool) -> None:
    file = REPOSITORY / path
    assert file.exists(), path
    if words or whole:
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
            try:
                started(file, words, patch)
            except SystemExit:
                raise AssertionError(said.getvalue()) from None


def script(path: str, words: list[str], whole: bool) -> None:
    """A launch script or job, named after the verb that it runs."""
    assert (REPOSITORY / path).is_file(), path
    stem = Path(path).stem
    if stem in VERBS and stem != "sweep":
        verb(stem, words, whole and bool(words))


def verb(name: str, words: list[str], whole: bool) -> None:
    if name.startswith("-"):
        return
    assert name in VERBS, f"kdad has no verb {name}"
    try:
        VERBS[name].make_context(name, list(words))
    except typer.BadParameter as error:
        assert type(error).__name__ == "MissingParameter" and not whole, error.message
        return
    changes = [word for word in words if "=" in word and not word.startswith("-")]
    if name not in {"train", "score", "sweep", "export"}:
        assert not changes, f"kdad {name} takes no configuration"
        return
    unknown = {change.partition("=")[0] for change in changes} - KEYS - SECTIONS
    assert not unknown, f"no such key: {unknown}"
    if name in {"train", "sweep"} and words and words[0] in recipe_names():
        load(words[0], changes)
    elif name in {"train", "sweep"} and whole:
        assert words[0].endswith((".yaml", ".yml")), f"no such recipe: {words[0]}"


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.suffix == ".md"], ids=lambda p: p.name)
def test_a_link_to_a_heading_finds_it(path: Path):
    for place, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)]+)\)", path.read_text()):
        target = path.parent / place if place else path
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
        assert heading in slugs, f"{target.name} has no heading #{heading}"


def test_the_layers_are_drawn_as_the_test_of_imports_has_them():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = {
        int(number): set(re.split(r" +", re.split(r"<br>", names)[0].strip()))
        for number, names in re.findall(r'^ *L(\d+)\["(.*?)"\]', text, re.MULTILINE)
    }
    parts = [layer for layer in LAYERS if layer != {"__main__"}]
    assert drawn == dict(enumerate(parts))
    arrows = re.findall(r"^ *(L\d+(?: --> L\d+)+)", text, re.MULTILINE)
    assert arrows == [" --> ".join(f"L{i}" for i in reversed(range(len(parts))))]


def test_every_method_is_a_module_with_a_recipe_and_a_golden_test():
    """As docs/extending.md says."""
    methods = [member.__args__[0].name for member in MethodConfig.__origin__.__args__]
    assert {load(name).method.name for name in recipe_names()} == set(methods)
    assert set(METHODS) == set(methods), "each is held to what tests/integration asks of all"
    for name in methods:
        assert (REPOSITORY / f"kdad_dist/methods/{name}.py").is_file()
        assert (REPOSITORY / f"tests/golden/test_{name}.py").is_file()
