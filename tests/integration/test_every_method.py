"""Every method as a whole: parallel equals serial, resumed equals undisturbed, scored alike."""

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import kdad_dist
from kdad_dist.config.load import load, load_run
from kdad_dist.errors import ConfigError, KdadError, WeightsError
from kdad_dist.export import onnx as export_onnx
from kdad_dist.export import pt2 as export_torch
from kdad_dist.export.write import export
from kdad_dist.report.page import write_report
from kdad_dist.runtime.restore import restore
from kdad_dist.train.dry_run import dry_run
from tests.helpers import texture
from tests.integration.test_detector import same
from tests.integration.test_scoring import results
from tests.kdad import configured, kdad, lines, stops, succeeds, weights
from tests.needs import REPOSITORY
from tests.tiny import CLASSES, FIND_ANOMALIES, METHODS, tiny

pytestmark = pytest.mark.launch
TERMS = {"loss", "value", "direction", "cross_entropy", "distillation", "accuracy"}
LAUNCHES = [("fsdp2", 2), ("zero3", 3), ("ddp", 1)]
MOVES = dict(zip(METHODS, cycle(permutations(LAUNCHES)), strict=False))
"""Every method goes through all of these, each in another order."""
SCORED = [("fsdp2", 2), ("zero3", 3), ("ddp", 4)]
READ = {"mkd": [[], ["method.localise=guided"]]}
"""The ways in which maps are made that are unlike."""


def classifier(folder: Path) -> Path:
    """As `configured`, with a teacher that has learnt the classes."""
    sections = tiny(
        "classkd",
        data={"classes": CLASSES},
        method={"teacher": {"weights": str(folder / "teacher")}},
        optim={"lr": 0.0003},  # relations of few images magnify the last bits
        train={"batch_size": 9},  # 9, 9, 7 of 25
    )
    path = configured(folder, sections, size=32)
    alone = ["method.teacher=null", "method.distill=none", "optim.lr=0.05"]
    succeeds("train", path, f"output={folder / 'teacher'}", *alone)
    return path


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory) -> Path:
    """A configuration, and beside it its runs on 1 and 2 processes."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "classkd":
        config = classifier(folder)
    else:
        score = {"smooth_sigma": 1, "opening": True}
        ahead = {"nesterov": True}
        config = configured(folder, tiny(request.param, score=score, optim=ahead), size=32)
    for processes in (1, 2):
        run = config.parent / f"run{processes}"
        succeeds("train", config, f"output={run}", processes=processes)
    return config


def apart(first: Path, second: Path, name: str = "loss") -> float:
    """The largest difference of a number between two runs, in shares of its largest value."""
    one, two = lines(first, name), lines(second, name)
    assert len(one) == 6
    return max(abs(one[step] - two[step]) for step in one) / max(one.values())


def test_the_losses_do_not_depend_on_the_number_of_processes(trained):
    one, two = (trained.parent / f"run{n}" for n in (1, 2))
    first = json.loads((one / "metrics.jsonl").read_text().splitlines()[0])
    for name in sorted(TERMS & first.keys()):
        assert apart(one, two, name) < 1e-5


def test_sharding_the_student_or_keeping_the_teachers_output_changes_no_loss(trained):
    launches = [("run2", "fsdp2", 2, ""), ("run2", "zero3", 2, "")]
    if trained.stem == "classkd":
        launches.append(("run2", "zero2", 2, ""))
    if trained.stem != "loramae":
        launches.append(("run1", "ddp", 1, "method.cache_teacher=true"))
    for expected, mode, processes, more in launches:
        run = trained.parent / f"as-{mode}"
        words = ["train", trained, f"output={run}", *more.split()]
        succeeds(*words, processes=processes, mode=mode)
        assert apart(trained.parent / expected, run) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["zero1", "zero2"])
def test_divided_moments_and_gradients_change_no_loss_and_resume_to_the_same_bits(trained, mode):
    whole, stopped = (trained.parent / f"{name}-{mode}" for name in ("whole", "stopped"))
    succeeds("train", trained, f"output={whole}", processes=3, mode=mode)
    assert apart(trained.parent / "run2", whole) < 1e-5
    words = ["train", trained, f"output={stopped}"]
    assert 0 < stops(*words, processes=3, mode=mode) < 6
    succeeds(*words, processes=3, mode=mode)
    assert lines(stopped) == lines(whole) and weights(stopped) == weights(whole)


def test_a_stopped_run_ends_as_the_undisturbed_one_and_on_more_processes(trained):
    stopped, whole = trained.parent / "stopped", trained.parent / "run2"
    assert 0 < stops("train", trained, f"output={stopped}", processes=2) < 6
    more = shutil.copytree(stopped, trained.parent / "more")
    succeeds("train", trained, f"output={stopped}", processes=2)
    assert lines(stopped) == lines(whole)
    assert weights(stopped) == weights(whole)
    succeeds("train", trained, f"output={more}", processes=3)
    assert apart(whole, more) < 1e-5


def test_a_run_that_moves_through_the_modes_ends_and_is_scored_as_one_that_stays(trained):
    moved, stays = trained.parent / "moved", trained.parent / "run1"
    words = ["train", trained, f"output={moved}"]
    *(first, second), (mode, processes) = MOVES[trained.stem]
    steps = [stops(*words, mode=m, processes=n) for m, n in (first, second)]
    assert 0 < steps[0] < steps[1] < 6
    succeeds(*words, mode=mode, processes=processes)
    assert apart(stays, moved) < 1e-5
    assert lines(moved, "val_loss") == pytest.approx(lines(stays, "val_loss"), rel=1e-5)
    for run in (moved, stays):
        succeeds("score", run)
    assert scores(moved) == pytest.approx(scores(stays), rel=1e-5)


def scores(run: Path) -> dict[str, float]:
    with (run / "scores/scores.csv").open() as file:
        return {row["key"]: float(row["pred_score"]) for row in csv.DictReader(file)}


def test_threads_may_share_a_detector(trained):
    torch.set_num_threads(1)  # on which the last bits depend
    images = [texture(i) for i in range(12)]
    for words in READ.get(trained.stem, [[]]):
        detector = kdad_dist.load(trained.parent / "run1", words)
        serial = [detector.predict(image) for image in images]
        with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for found, expected in zip(pool.map(detector.predict, images), serial, strict=True):
                assert same(found, expected)


@pytest.mark.parametrize("trained", FIND_ANOMALIES, indirect=True)
def test_results_are_the_same_bits_on_1_to_4_processes_in_any_mode_and_make_a_page(trained):
    run = trained.parent / "run1"
    succeeds("score", run, "score.save_maps=npy")
    serial = results(run)
    assert len([name for name in serial if name.startswith("scores/maps/")]) == 7
    for mode, processes in SCORED:
        succeeds("score", run, "score.save_maps=npy", processes=processes, mode=mode)
        assert results(run) == serial, f"{mode}, {processes} processes"
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(value is not None for value in metrics["mean"].values())
    assert trained.stem in write_report(run).read_text()
    said = kdad_dist.load(run).predict(np.stack([texture(1), texture(2)]))
    assert said.anomaly_map.shape == (2, 32, 32) and said.pred_label is not None


@pytest.mark.parametrize("trained", ["classkd"], indirect=True)
def test_a_classifier_is_scored_exported_and_becomes_a_teacher(trained, tmp_path):
    run = shutil.copytree(trained.parent / "run1", tmp_path / "run1")
    succeeds("score", run)
    serial = results(run)
    # From here on its own teacher is out of reach.
    teacher = (trained.parent / "teacher").rename(tmp_path / "teacher")
    for mode, processes in SCORED:
        succeeds("score", run, processes=processes, mode=mode)
        assert results(run) == serial, f"{mode}, {processes} processes"
    metrics = json.loads((run / "metrics.json").read_text())
    counts = np.array(metrics["confusion"]["images"])
    assert counts.sum(1).tolist() == [4, 4, 4] and metrics["held_out"]["images"] == 5
    assert metrics["mean"]["accuracy"] == pytest.approx(counts.trace() / 12)
    assert list(metrics["categories"]) == CLASSES
    assert metrics["mean"]["image_auroc"] is None and metrics["threshold"] is None
    assert "What is taken for what" in write_report(run).read_text()

    # Nor is it asked for where new images are judged, though test images be compared with it.
    configuration = yaml.safe_load((run / "config.yaml").read_text())
    beside = {"weights": str(trained.parent / "teacher")}
    configuration["method"] |= {"explain": True, "beside": beside}
    (run / "config.yaml").write_text(yaml.safe_dump(configuration))
    with pytest.raises(WeightsError, match=r"method\.teacher.*method\.beside[\s\S]*explain=false"):
        restore(load_run(run), explains=True)
    images = sorted((trained.parent / "images/test").rglob("*.png"))
    said = kdad_dist.load(run).predict(images)
    assert said.logits is not None and said.pred_label is not None
    rows = (run / "scores/scores.csv").read_text().splitlines()[1:]
    assert [row.split(",")[5] for row in rows] == [str(label) for label in said.pred_label]
    outcome = succeeds("score", run, "--images", trained.parent / "images/test/red")
    assert "4 images: " in outcome.text and "threshold" not in outcome.text

    assert_graphs_tell_the_same_classes(run, images)
    succeeds("export", run)
    teacher.rename(trained.parent / "teacher")
    exported = run / "export/student.safetensors"
    words = [f"method.teacher.weights={exported}", "method.distill=hinton"]
    words += [f"method.network.weights={run}", "method.network.freeze=all", "train.steps=1"]
    words += ["method.network.head=linear"]  # small beside the backbone, which is not written
    frozen = trained.parent / "frozen"
    succeeds("train", trained, f"output={frozen}", *words)
    [step] = (frozen / "checkpoints").glob("step_*")
    assert sum(file.stat().st_size for file in step.iterdir()) < exported.stat().st_size / 4
    sharded = trained.parent / "frozen-sharded"
    succeeds("train", trained, f"output={sharded}", *words, processes=2, mode="fsdp2")
    assert lines(sharded) == pytest.approx(lines(frozen), rel=1e-5)


def assert_graphs_tell_the_same_classes(run: Path, images: list[Path]) -> None:
    accuracy = json.loads((run / "metrics.json").read_text())["mean"]["accuracy"]
    pixels = np.stack([np.asarray(Image.open(image)) for image in images])
    said = kdad_dist.load(run, device="cpu").predict(pixels)
    for kind, runner in (("onnx", export_onnx.runner), ("torch", export_torch.runner)):
        entry = export(load_run(run), kind)
        assert (
            json.loads(entry["facts"]["classes"]) == CLASSES and "threshold" not in entry["facts"]
        )
        assert entry["parity"]["accuracy"] == {"run": accuracy, "exported": accuracy}
        assert entry["parity"]["images"] == 12 and entry["parity"]["images_relabelled"] == 0
        exported = runner(Path(entry["path"]).read_bytes())
        for count in (12, 1):
            given = exported(pixels[:count])
            assert given.keys() == {"pred_score", "logits", "probabilities", "pred_label"}
            for name, values in given.items():
                np.testing.assert_allclose(values, getattr(said, name)[:count], rtol=1e-4)
    words = [REPOSITORY / "examples/judge.py", run / "export/classifier.onnx", *images]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    verdicts = [line.rsplit(" ", 1)[1] for line in told.stdout.splitlines()]
    assert verdicts == [CLASSES[label] for label in said.pred_label]


@pytest.mark.parametrize("trained", ["classkd"], indirect=True)
def test_angles_and_a_backbone_frozen_but_for_its_norms_are_learnt_alike_on_two_processes(trained):
    words = ["method.distill=rkd_angle", "method.network.freeze=all_but_bn", "train.steps=6"]
    words += [
        f"method.network.weights={trained.parent / 'teacher'}",
        "method.network.head=original",
    ]
    runs = [trained.parent / f"angles-{mode}" for mode in ("ddp", "fsdp2")]
    succeeds("train", trained, f"output={runs[0]}", *words)
    succeeds("train", trained, f"output={runs[1]}", *words, processes=2, mode="fsdp2")
    assert max(apart(*runs, name) for name in ("loss", "distillation")) < 1e-5


@pytest.mark.parametrize("trained", ["classkd"], indirect=True)
def test_a_teacher_that_has_not_finished_is_refused_with_its_step(trained, tmp_path):
    teacher = shutil.copytree(trained.parent / "teacher", tmp_path / "teacher")
    status = json.loads((teacher / "status.json").read_text())
    (teacher / "status.json").write_text(json.dumps(status | {"state": "preempted", "step": 2}))
    words = [f"output={tmp_path / 'run'}", f"method.teacher.weights={teacher}"]
    with pytest.raises(ConfigError, match=r"teacher has not finished: it is preempted, at step 2"):
        dry_run(load(trained, words), 1, "ddp")


def in_a_folder_of_its_own(root: Path) -> None:
    os.chdir(root / os.environ["RANK"])


@pytest.mark.parametrize("trained", ["classkd"], indirect=True)
@pytest.mark.parametrize(
    ("other", "said"),
    [("run1", "process 1 has read something else than process 0"), ("damaged", "sha256")],
)
def test_a_teacher_that_is_another_one_for_one_process_is_refused_by_all(
    trained, tmp_path, other, said
):
    shutil.copytree(trained.parent / "teacher", tmp_path / "0/teacher")
    is_damaged = other == "damaged"
    source = trained.parent / ("teacher" if is_damaged else other)
    theirs = shutil.copytree(source, tmp_path / "1/teacher")
    for file in theirs.rglob("*.distcp") if is_damaged else ():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    words = ["train", trained, f"output={tmp_path / 'run'}", "method.teacher.weights=teacher"]
    outcome = kdad(*words, processes=2, first=partial(in_a_folder_of_its_own, tmp_path))
    assert outcome.codes == [1, 1] and outcome.text.count("kdad: ") == 1, outcome.text
    assert said in outcome.text and not list(tmp_path.rglob("run/checkpoints/step_*"))


@pytest.mark.parametrize("trained", ["classkd"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["data.classes=null"], 'set data.classes=["blue", "green", "red"]'),
        (["data.classes=[red, gren, blue]"], "did you mean green?"),
        (["data.classes=[red, blue]"], "tells apart red, green, blue"),
        (["data.classes=[green, red, blue]"], "in its order"),
        (["method.teacher.weights=nowhere"], "there is no weights file nowhere"),
        (["train.micro_batch_size=2"], "relates each image to all others"),
        (["method.network.backbone=resnet19"], "method.network.backbone: timm has no"),
        (["score.standardise=true"], "knows neither normal images nor anomaly maps"),
        (["method.network.freeze=all"], "never trained"),
        (["method.distill=none"], "learns nothing of a teacher"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_with_the_way_out(trained, tmp_path, changes, problem):
    with pytest.raises(KdadError) as error:
        dry_run(load(trained, [f"output={tmp_path}", *changes]), 1, "ddp")
    assert problem in f"{error.value.problem} {error.value.remedy}"


@pytest.mark.parametrize("trained", ["mkd"], indirect=True)
def test_without_maps_there_are_scores_and_pixel_metrics_say_why_not(trained, tmp_path):
    run = shutil.copytree(trained.parent / "run1", tmp_path / "run")
    succeeds("score", run)
    scores = [row.split(",")[4] for row in (run / "scores/scores.csv").read_text().splitlines()]
    none = ("method.localise=none",)
    succeeds("score", run, *none)
    rows = (run / "scores/scores.csv").read_text().splitlines()
    assert [row.split(",")[4] for row in rows] == scores
    tile = json.loads((run / "metrics.json").read_text())["categories"]["tile"]
    assert tile["image_auroc"] is not None and tile["pixel_auroc"] is None
    assert "map" in tile["notes"]["pixel_auroc"]
    write_report(run)
    outcome = kdad("score", run, *none, "score.standardise=true")
    assert outcome.codes == [1] and "no maps" in outcome.text
