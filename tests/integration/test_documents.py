"""What the documents tell a reader to type is typed, in their order, on stand-ins for photographs.

Behind `stfpm_mvtec` the tutorial's reader also types SMALL. What would take hours is foretold by
`--dry-run`, with WEIGHTS instead of what a hub would have to send. Everything else stands in
CHECKED, with the place where it is run, or in EXCUSED, with the reason why it is not.
"""

import csv
import io
import itertools
import os
import re
from collections import defaultdict
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import typer
from safetensors.torch import save_file

from kdad_dist.cli.app import app
from kdad_dist.config.load import load, recipe_names
from tests.bundles import CLASSES, make_cifar_python, make_mnist
from tests.documents import BLOCK, FOUND, Command
from tests.helpers import make_mvtec, save_image, texture
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
GPU, SERVICE = "wants GPUs", "wants a network, and an account or weights that lie there"
LATER = "wants the weights of hours of training, on data sets that are not shipped"
ITSELF, IN_FULL = "the tests themselves", "typed, with names in the places of capitals"
MENTION = "a mention, of what is typed in other documents"
SOME = ("daily", "export", "cluster", "results")
CIFAR10 = (*CLASSES, "deer", "dog", "frog", "horse", "ship", "truck")
EXCUSED = {
    "make (test|coverage|soak|check)$|.ci/run|pre-commit install": ITSELF,
    "MODE=(multi_)?gpu|multi_gpu.yaml": GPU,
    "pip install|wandb (sync|login)|hf download|name=classkd-teacher": SERVICE,
    "results.md: (kdad|launch/)(| )(score|report|export)": LATER,
    "method.teacher.weights=runs/classkd-teacher": LATER,
    "(train|sweep) CONFIG( .a.b.*| .--seeds.*| --dry-run --processes n)?$": IN_FULL,
    "score RUN( --images FILE)?$": IN_FULL,
    "shards/README.md": IN_FULL,
    "CHANGELOG|docs/(config|log|architecture).md": MENTION,
    "results.md: kdad train (--dry-run|stfpm_mvtec data.image_size=128)$": MENTION,
}
"""Why a command is typed nowhere, by document or text."""
CHECKED = {
    "make demo|kdad demo": ("integration/test_demo.py", '"kdad_dist", "demo"'),
    "slurm/train.sbatch": ("slurm/test_slurm.py", '"slurm/train.sbatch"'),
    "slurm/score.sbatch": ("slurm/test_slurm.py", '"slurm/score.sbatch"'),
    "slurm/sweep.sbatch|CONFIG --slurm": ("slurm/test_slurm.py", '"sweep", config, "--slurm"'),
    "accelerate/cpu.yaml": ("integration/test_launchers.py", '"cpu.yaml" in c.text'),
    "launch --(cpu|multi_gpu) --num": (
        "integration/test_launchers.py",
        '"--cpu", "--num_processes"',
    ),
    "PROCESSES=N launch/train.sh": ("distributed/test_launch_scripts.py", 'KDAD_PROCESSES="3"'),
    "KDAD_MACHINE": ("distributed/test_two_machines.py", '"KDAD_MACHINE_RANK"'),
    "launch/doctor.sh": ("distributed/test_launch_scripts.py", 'script("doctor"'),
    "export KDAD_PROCESSES=2": ("distributed/test_launch_scripts.py", 'KDAD_PROCESSES="2"'),
    "--watch": ("integration/test_daily.py", '"--watch"'),
    "doctor --launch": ("integration/test_daily.py", '"doctor", config, "--launch", 2'),
    "--format onnx": ("integration/test_export.py", '"--format", "onnx"'),
    "--format torch": ("integration/test_export.py", 'for kind in ("onnx", "torch")'),
    "report runs/mvtec": ("unit/test_sweep_table.py", "report(sweep.directory"),
    "score RUN data.image_size": ("integration/test_tiles.py", '"data.image_size=32"'),
    "score RUN data.centre_margin": ("integration/test_window.py", '["data.centre_margin=0"]'),
    "pack --resize shorter": ("unit/test_image.py", '15, "shorter"'),
    "explain=true": ("distributed/test_discriminator.py", '"method.explain=true"'),
    "localise=smoothgrad": ("golden/test_mkd.py", 'localise="smoothgrad"'),
    "configs/\\S+: kdad export runs/mae-pretrain": (
        "integration/test_loramae.py",
        '"export", base',
    ),
    "benchmarks/": ("architecture/test_documents.py", "started(file, words, patch)"),
}
"""The test, and words in it, of what is not typed here, by document or text."""


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
    """The rows of EXCUSED and CHECKED that mean a command."""
    return [row for row in (*EXCUSED, *CHECKED) if re.search(row, str(command))]


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
    tutorial.types("kdad score runs/mine --both")
    [export] = whole("docs/export.md")
    said = tutorial.types(export.replace("RUN", "runs/mine"))
    assert "export/student.safetensors" in said
    assert re.search(r"compared with the checkpoint: (\d+) of \1 tensors are the same\n", said)


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


def test_what_led_to_the_results_is_foretold_from_the_files_that_stand_there(tmp_path):
    for name in ("magnetic_tile", "hazelnut", "photos", "FOLDER"):
        make_mvtec(tmp_path, name, train=5, good=1, scratch=1)
    for split, name, seed in itertools.product(("train", "test"), CIFAR10, range(5)):
        save_image(tmp_path / f"cifar10_subset/{split}/{name}/{seed}.png", texture(seed))
    resnet = timm.create_model("resnet18", num_classes=0).state_dict()
    vit = timm.create_model("test_vit", num_classes=10).state_dict()
    (tmp_path / "runs/vit-teacher/export").mkdir(parents=True)
    save_file(vit, tmp_path / "runs/vit-teacher/export/student.safetensors")
    for name in ("resnet18_imagenet_layer1-3", "resnet18_part"):
        save_file(resnet, tmp_path / f"{name}.safetensors")
    text = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    [files] = [body for language, body in BLOCK.findall(text) if language == "yaml"]
    for name, content in re.findall(r"^# (\w+\.yaml)\n(.*?)(?=^# |\Z)", files, re.M | re.S):
        (tmp_path / name).write_text(content)
    reader = Reader(tmp_path, defaultdict(str, loramae_small=WEIGHTS["loramae"]), dry=True)
    for line in whole("docs/results.md"):
        line = line.replace("launch/train.sh", "kdad train").replace("seed=S", "seed=0")
        reader.types(line.replace("weights=W ", "weights=resnet18_part.safetensors "))


def test_every_other_command_is_accounted_for():
    typed = {
        *whole("docs/tutorial.md"),
        *("kdad score runs/mine --images new/", "kdad score RUN --both", "kdad export runs/mine"),
        *(line for name in SOME for line in whole(f"docs/{name}.md")),
        *(line for name in RECIPES for line in whole(f"configs/{name}.yaml")),
    }
    commands = [command for command in FOUND if command.whole or len(command.text.split()) > 2]
    left = [command for command in commands if command.text not in typed]
    lost = [str(command) for command in left if not elsewhere(command)]
    assert not lost, "neither typed here nor in EXCUSED or CHECKED:\n" + "\n".join(lost)
    mentions = {row for row, reason in EXCUSED.items() if reason in {MENTION, IN_FULL}}
    assert not [str(c) for c in left if c.whole and mentions.issuperset(elsewhere(c))]
    used = {row for command in left for row in elsewhere(command)}
    assert {*EXCUSED, *CHECKED} == used, "not in any document"
    for file, words in CHECKED.values():
        assert words in (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), (file, words)
