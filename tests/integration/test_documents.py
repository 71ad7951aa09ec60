"""What the documents tell a reader to type is typed, in their order, on stand-ins for photographs.

Behind `stfpm_mvtec` the tutorial's reader also types SMALL. What would take hours is foretold by
`--dry-run`, with WEIGHTS instead of what a hub would have to send. Everything else stands in
ELSEWHERE, with the place where it is run or the reason why it is not.
"""

import csv
import io
import os
import re
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

from kdad_dist.cli.app import app
from kdad_dist.config.load import load, recipe_names
from tests.bundles import CLASSES, make_cifar_python, make_mnist
from tests.documents import FOUND, Command
from tests.helpers import make_mvtec
from tests.kdad import kdad
from tests.methods import make_hub_vit
from tests.needs import REPOSITORY

pytestmark = pytest.mark.launch

VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RECIPES = [name for name in recipe_names() if name != "demo"]
SMALL = {
    "stfpm_mvtec": "method.teacher.backbone=resnet10t method.teacher.weights=random"
    " method.teacher.layers=[1,2] data.image_size=64 train.epochs=2"
}
"""Typed behind a recipe that is trained, by its name: no download, and a second's work."""
WEIGHTS = {
    "classkd": f"method.network.weights=random data.classes=[{','.join(CLASSES)}]",
    "loramae": "method.weights=random method.freeze_random=true",
    "vitkd": "method.teacher.weights=random",
    "mkd": "method.teacher.weights=random",
    "stfpm": "method.teacher.weights=random",
}
"""Typed behind a recipe that is foretold, by its method; CIFAR-10 has four classes here."""
OWN = {"mae_pretrain": "", "vitkd_cifar10": "method.teacher.backbone=hub"}
"""Instead of these, by the name of the recipe."""
ELSEWHERE = {
    "CHANGELOG|docs/(config|log|architecture).md": "mentions, of what is typed in other documents",
    "make (test|coverage|soak|check)$": "the tests themselves, and their campaigns",
    "make demo|kdad demo": "tests/integration/test_demo.py, without the installation",
    "docs/results.md": "hours, on data sets that are not shipped; done by hand once",
    "sbatch|CONFIG --slurm": "tests/slurm/test_slurm.py and tests/unit/test_sweep.py",
    "MODE=(multi_)?gpu|multi_gpu.yaml": "wants GPUs",
    "accelerate launch": "tests/integration/test_launchers.py",
    "PROCESSES=N launch/train.sh": "tests/distributed/test_launch_scripts.py",
    "MACHINE_RANK=": "tests/distributed/test_two_machines.py",
    "--watch|doctor --launch|doctor.sh": "tests/integration/test_daily.py",
    "--format (onnx|torch)": "tests/integration/test_export.py",
    "kdad score RUN --both|report runs/mvtec": "tests/integration/test_sweep.py",
    "(train|sweep) CONFIG( .a.b.*| .--seeds.*| --dry-run --processes n)?$": "typed, of a recipe",
    "score RUN( --images FILE)?$": "typed, of runs/mine",
    "score RUN data.image_size": "tests/integration/test_tiles.py",
    "score RUN data.centre_margin": "tests/integration/test_window.py",
    "pack --resize shorter": "tests/unit/test_image.py and test_pack.py",
    "explain=true": "tests/unit/test_score_explain.py",
    "localise=smoothgrad": "tests/golden/test_mkd.py",
    "freeze=all_but_bn": "wants weights from the hub; tests/golden/test_classkd.py",
    "export runs/mae-pretrain|method.teacher.weights=runs/": "after hours of training;"
    " tests/integration/test_loramae.py and test_every_method.py with small networks",
    "shards/README.md": "typed, of photos/ and shards/mine",
}
"""Commands that are not typed here, by document or text: where they are, or why they are not."""


class Reader:
    """Someone who sits in a folder with a terminal, and what the commands said there."""

    def __init__(self, folder: Path, behind: dict[str, str], dry: bool = False) -> None:
        """Args:
        behind: what is typed behind the name of a recipe.
        dry: whether trainings are not started, but foretold; sweeps always are.
        """
        self.folder, self.behind, self.dry = folder, behind, dry
        self.said: dict[str, str] = {}

    def types(self, line: str) -> str:
        """What it said; every command of a document succeeds."""
        program, verb, *words = re.sub(r" \[(--[^]]*)\]", r" \1", line).split()
        assert program == "kdad", line
        words = [{"train.epochs=200": "train.epochs=3"}.get(word, word) for word in words]
        if verb == "train":
            words[1:1] = self.behind[words[0]].split()
        if verb == "sweep" or (verb == "train" and self.dry):
            words.append("--dry-run")
        if verb in {"pack", "sweep"} or "--dry-run" in words:
            self.said[line] = self.within(verb, words)
        else:
            outcome = kdad(verb, *words, first=partial(os.chdir, self.folder))
            assert outcome.codes == [0], f"{line}\n{outcome.text}"
            self.said[line] = outcome.text
        return self.said[line]

    def within(self, verb: str, words: list[str]) -> str:
        """As typed, but in this process: for what needs no other."""
        said = io.StringIO()
        with chdir(self.folder), redirect_stdout(said), redirect_stderr(said):
            VERBS[verb].main(words, standalone_mode=False)
        return said.getvalue()


def whole(document: str) -> list[str]:
    """The commands to type, each once, of a document's blocks of code or a recipe's head."""
    found = [command for command in FOUND if command.where == document and command.whole]
    return list(dict.fromkeys(each.text for each in found if not elsewhere(each)))


def elsewhere(command: Command) -> list[str]:
    """The rows of ELSEWHERE that mean a command."""
    return [row for row in ELSEWHERE if re.search(row, str(command))]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Reader:
    """The reader of docs/tutorial.md at its end."""
    folder = tmp_path_factory.mktemp("reader")
    make_mvtec(folder, "photos", train=10)
    make_mvtec(folder, "new", train=2, good=0, scratch=1)
    for part in ("nut", "bolt"):
        make_mvtec(folder / "parts", part, train=4, good=1, scratch=1)
    reader = Reader(folder, SMALL)
    for line in whole("docs/tutorial.md"):
        reader.types(line)
    return reader


def test_the_tutorial_leads_from_a_folder_to_a_report(tutorial):
    folder, said = tutorial.folder, tutorial.said
    assert len(said) == 14
    pack = "kdad pack photos/ shards/mine"
    assert "because photos/train/good exists" in said[pack]
    assert "is sound" in said["kdad verify shards/mine --decode"]
    train = "kdad train stfpm_mvtec data.shards=shards/mine data.category=all name=mine"
    assert "starts anew" in said[f"{train} --dry-run"]
    assert "8 training images, 2 held out" in said[f"{train} --dry-run"]
    assert "8 training images, 2 held out" in said[train]
    assert re.search(r"finished +runs/mine +2/2", said["kdad status runs"])
    assert (folder / "runs/mine/report.html").is_file()
    with (folder / "runs/mine/scores/scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7
    assert "synthetic defects" not in said["kdad score runs/mine"]
    assert "held-out, synthetic defects" in said["kdad score runs/mine score.synthetic=true"]
    compared = said["kdad compare runs/mine runs/mine-long"]
    assert re.search(r"train.epochs +2 +3", compared)
    assert re.search(r"held-out, synthetic defects image AUROC +[\d.]+ +[\d.]+ +[+-]", compared)
    judged = folder / "judged"
    with (judged / "predictions.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert columns >= {"file", "pred_score", "pred_label", "boxes"}
    assert {path.name for path in judged.iterdir() if path.is_dir()} >= {"maps", "overlays"}
    sweep = "kdad sweep stfpm_mvtec data.shards=shards/parts name=parts --seeds 3"
    assert "0 of 6 runs are done" in said[sweep]

    index = folder / "shards/mine/index.json"
    before = index.stat().st_mtime_ns
    tutorial.types(pack)
    assert index.stat().st_mtime_ns == before, "packing again did something"


def test_the_readme_says_the_same_in_three_lines_and_a_few_of_python(tutorial, monkeypatch):
    lines = whole("README.md")
    assert len(lines) == 4 and set(lines) <= set(tutorial.said)
    tutorial.types("kdad score runs/mine --images new/")
    assert (tutorial.folder / "runs/mine/predictions/predictions.csv").is_file()
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tutorial.folder)
    names = {"images": sorted(Path("new").rglob("*.png"))}
    exec(program, names)
    result = names["result"]
    assert len(result.pred_score) == len(result.pred_label) == len(names["images"])
    assert result.anomaly_map is not None and result.reconstruction is None


def test_what_is_for_every_day_works_on_the_runs_of_the_tutorial(tutorial, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = whole("docs/daily.md")
    assert len(lines) == 4
    for line in lines:
        line = line.replace("runs/a", "runs/mine").replace("runs/b", "runs/mine-long")
        tutorial.types(line)
    assert "2 finished" in tutorial.said["kdad status runs/"]
    [export] = whole("docs/export.md")
    said = tutorial.types(export.replace("RUN", "runs/mine"))
    assert "export/student.safetensors" in said
    assert "largest difference to the checkpoint: 0" in said


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Reader:
    """A reader with a folder for each name that recipes give to data sets, all of them tiny."""
    folder = tmp_path_factory.mktemp("shop")
    for name in ("bottle", "tile", "capsule", "hazelnut"):
        make_mvtec(folder / "MVTEC_FOLDER", name, train=4, good=1, scratch=1)
    for name in ("FOLDER", "PHOTOS"):
        make_mvtec(folder, name, train=4, good=1, scratch=0)
    make_cifar_python(folder / "CIFAR10_FOLDER")
    make_mnist(folder / "MNIST_FOLDER")
    make_mnist(folder / "FASHION_FOLDER", (9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 4, 4), (9, 2, 1, 1, 6, 1))
    make_hub_vit(folder / "hub", 224, depth=12)
    method = {name: load(name).method.name for name in RECIPES}
    return Reader(folder, {name: OWN.get(name, WEIGHTS[method[name]]) for name in RECIPES}, True)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_recipe_says_what_works(shop, name):
    lines = whole(f"configs/{name}.yaml")
    assert len(lines) > 1
    for line in lines:
        shop.types(line)


def test_what_is_for_clusters_is_foretold_on_a_laptop(shop):
    for pack in ("MVTEC_FOLDER shards/mvtec", "CIFAR10_FOLDER shards/cifar10-144 --size 144"):
        shop.types(f"kdad pack {pack}")
    train, classes, variants = whole("docs/cluster.md")
    assert " on 64 processes, mode fsdp2" in shop.types(train.replace("CONFIG", "stfpm_mvtec"))
    assert "0 of 6 runs are done" in shop.types(classes)
    assert "sbatch" in shop.types(variants)


def test_every_other_command_is_accounted_for():
    typed = {
        *whole("docs/tutorial.md"),
        *("kdad score runs/mine --images new/", "kdad export runs/mine"),
        *(line for name in ("daily", "export", "cluster") for line in whole(f"docs/{name}.md")),
        *(line for name in RECIPES for line in whole(f"configs/{name}.yaml")),
    }
    commands = [command for command in FOUND if command.whole or len(command.text.split()) > 2]
    left = [command for command in commands if command.text not in typed]
    lost = [str(command) for command in left if not elsewhere(command)]
    assert not lost, "neither typed here nor in ELSEWHERE:\n" + "\n".join(lost)
    used = {row for command in left for row in elsewhere(command)}
    assert set(ELSEWHERE) == used, f"not in any document: {set(ELSEWHERE) - used}"
    files = re.findall(r"tests/\S+\.py", " ".join(ELSEWHERE.values()))
    assert all((REPOSITORY / file).is_file() for file in files)
