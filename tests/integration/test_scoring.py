"""Scoring as a whole: the same bits on any number of processes, every image once, honest nulls."""

import csv
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from kdad_dist.config.load import load, load_run
from kdad_dist.data.new_images import find_images
from kdad_dist.errors import DataError
from kdad_dist.methods import build_method
from kdad_dist.report.page import write_report
from kdad_dist.runtime.restore import restore
from kdad_dist.runtime.stopping import LOOK_EVERY
from tests.helpers import make_mvtec, save_image, texture
from tests.kdad import Launched, kdad, succeeds, until
from tests.launcher import wait_for

pytestmark = pytest.mark.launch


def stfpm(backbone: str, layers: list[int]) -> dict[str, Any]:
    return {"teacher": {"weights": "random", "backbone": backbone, "layers": layers}}


NETWORKS = {
    "resnet": stfpm("resnet10t", [1, 2]),
    "vgg": stfpm("vgg11", [1, 2]),
    "vit": stfpm("test_vit", [0, 1]),
    "mae": {
        "name": "loramae",
        "preset": "mae_vit_tiny_patch8",
        "weights": "random",
        "freeze_random": True,
    },
}


def write_config(folder: Path, shards: Path, network: str, size: int = 32) -> Path:
    path = folder / f"{network}.yaml"
    config = {
        "name": network,
        "data": {"shards": str(shards), "image_size": size},
        "method": NETWORKS[network],
        "optim": {"name": "adam", "lr": 1.0e-3},
        "train": {"steps": 2, "batch_size": 4},
        "score": {"smooth_sigma": 1, "synthetic": True},
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards with 7 test images, 3 of them good, and a trained run for each network."""
    folder = tmp_path_factory.mktemp("scoring")
    make_mvtec(folder / "images", train=10, good=3, scratch=4)
    for size in (32, 160):
        succeeds("pack", folder / "images", folder / f"shards{size}", "--size", size)
    for network in NETWORKS:
        size = 160 if network == "vit" else 32  # the ViT's own input size
        config = write_config(folder, folder / f"shards{size}", network, size)
        succeeds("train", config, f"output={folder / network}")
    return folder


def results(run: Path) -> dict[str, bytes]:
    """Every file that scoring wrote, without what tells of time and processes."""
    files = {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted((run / "scores").rglob("*"))
        if file.is_file()
    }
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("time", "seconds", "images_per_second", "latency_ms", "world_size"):
        metrics["provenance"].pop(name)
    return files | {"metrics.json": json.dumps(metrics).encode()}


@pytest.mark.parametrize("network", NETWORKS)
def test_results_of_every_network_are_the_same_bits_on_three_processes(folder, network):
    run = folder / network
    succeeds("score", run, "score.save_maps=npy")
    serial = results(run)
    assert len([name for name in serial if name.startswith("scores/maps/")]) == 7
    succeeds("score", run, "score.save_maps=npy", processes=3)
    assert results(run) == serial


def test_every_image_is_scored_once_and_every_figure_is_there(folder):
    run = folder / "resnet"
    succeeds("score", run, processes=2)
    rows = list(csv.DictReader((run / "scores/scores.csv").open()))
    assert len({row["key"] for row in rows}) == len(rows) == 7
    assert [row["defect_type"] for row in rows].count("scratch") == 4
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(value is not None for value in metrics["mean"].values())
    assert metrics["threshold"]["images"] >= 1
    assert set(metrics["synthetic"]) == set(metrics["mean"])
    assert metrics["provenance"]["checkpoint_rule"] == "lowest loss on held-out images"
    assert {"roc", "pixel_roc", "pro"} <= set(
        json.loads((run / "scores/curves.json").read_text())["tile"]
    )


def test_standardised_maps_are_the_same_bits_on_any_number_of_processes(folder, tmp_path):
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    succeeds("score", run, "score.save_maps=npy")
    plain = results(run)
    words = [run, "score.standardise=true", "score.save_maps=npy"]
    succeeds("score", *words)
    serial = results(run)
    assert "scores/standard.safetensors" in serial
    assert serial["scores/scores.csv"] != plain["scores/scores.csv"]
    succeeds("score", *words, processes=3)
    assert results(run) == serial
    image = save_image(tmp_path / "new.png", texture(1))
    succeeds("score", *words, "--images", image)
    outcome = kdad("score", *words, "score.smooth_sigma=3", "--images", image)
    assert outcome.codes == [1] and "smooth_sigma 3" in outcome.text  # it is of smoother maps
    (run / "scores/standard.safetensors").write_bytes(b"damaged")
    outcome = kdad("score", *words, "--images", image)
    assert outcome.codes == [1] and "cannot be read" in outcome.text
    shutil.rmtree(run / "scores")
    outcome = kdad("score", *words, "--images", image)
    assert outcome.codes == [1]
    assert "standard.safetensors" in outcome.text


def test_examples_keep_reconstructions_where_the_method_gives_them(folder):
    for network in ("resnet", "mae"):
        run = folder / network
        succeeds("score", run)
        examples = run / "scores/examples"
        entries = json.loads((examples / "examples.json").read_text())
        names = [entry["reconstruction"] for entry in entries]
        if network == "resnet":
            assert names == [None] * len(entries)
            assert not list(examples.glob("*_reconstruction.png"))
        else:
            assert all(Image.open(examples / name).size == (32, 32) for name in names)
        page = write_report(run).read_text()
        assert ('alt="The image as the method reconstructs it' in page) == (network == "mae")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("photo", "photo does not exist\n  -> did you mean photos? give images"),
        ("photos", "photos holds no image"),
        ("photos/*.png", "photos/*.png matches no file"),
        ("pipe.png", "pipe.png is a pipe, a device or a link to nothing, not a file\n  -> give"),
        ("gone.png", "gone.png is a pipe, a device or a link to nothing, not a file\n  -> give"),
    ],
)
def test_what_names_no_new_image_is_told_why(tmp_path, monkeypatch, word, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError) as told:
        find_images([word], tmp_path / "out")
    assert said in str(told.value)


def test_speed_is_told_of_the_test_split_and_of_new_images(folder, tmp_path):
    run = folder / "resnet"
    outcome = succeeds("score", run, processes=2)
    provenance = json.loads((run / "metrics.json").read_text())["provenance"]
    assert outcome.text.count("the teacher's weights are random") == 1
    image = save_image(tmp_path / "new.png", texture(1))
    words = ["--images", image, "--out", tmp_path / "out", "--json"]
    answered = succeeds("score", run, *words)
    facts = json.loads((tmp_path / "out/predictions.json").read_text())
    assert json.dumps(facts, indent=2) in answered.text
    assert facts["provenance"]["images"] == 1
    assert facts["provenance"]["readout"] == provenance["readout"]
    for told, text in ((provenance, outcome.text), (facts["provenance"], answered.text)):
        latency = told["latency_ms"]
        assert 0 < latency["median"] <= latency["p95"]
        assert latency["unit_images"] == 1
        assert f"speed: {told['images_per_second']:g} images/s" in text


def test_how_a_student_is_read_may_change_in_its_run(folder, tmp_path):
    run = shutil.copytree(folder / "mae", tmp_path / "run")
    image = save_image(tmp_path / "new.png", texture(1))
    succeeds("score", run)
    before, config = results(run), (run / "config.yaml").read_bytes()
    succeeds("score", run, "method.inference.pattern=stripes")
    assert results(run)["scores/scores.csv"] != before["scores/scores.csv"]
    assert (run / "config.yaml").read_bytes() == config
    outcome = succeeds("score", run, "--images", image)
    assert "no threshold" in outcome.text  # it is of stripes, and these are diagonals
    unlike = "is of inference.pattern stripes; this is inference.pattern diagonal; for a threshold"
    assert unlike in outcome.text
    assert "1 image, not judged" in outcome.text
    outcome = succeeds("score", run, "method.inference.pattern=stripes", "--images", image)
    assert "no threshold" not in outcome.text
    outcome = kdad("score", run, "method.inference.masks=5")
    assert outcome.codes == [2]


@pytest.mark.parametrize(
    ("network", "override"),
    [
        ("mae", "method.norm_pix_loss=false"),  # whose checkpoint would fit all the same
        ("resnet", "method.normalize=false"),
        ("resnet", "data.val_fraction=0.9"),  # with a threshold from images that were learnt
    ],
)
def test_a_student_is_not_read_as_another_one(folder, tmp_path, network, override):
    run, image = folder / network, save_image(tmp_path / "new.png", texture(1))
    for words in (["score", run], ["score", run, "--images", image], ["export", run]):
        outcome = kdad(*words, override)
        assert outcome.codes == [2] and override.split("=")[0] in outcome.text, outcome.text
        assert "was trained otherwise" in outcome.text


def until_asked(units: int) -> None:
    """Counts in the run how many units have begun; after so many, has them last until a file says
    that somebody asked to stop, and a little longer.
    """
    from kdad_dist import detector
    from kdad_dist.score import unit

    judge, run = detector.judge, Path(sys.argv[2])

    def slow(*arguments):
        with (run / "began").open("a") as file:
            file.write(os.environ["RANK"])
        if began(run, units):
            wait_for((run / "asked").exists)
            time.sleep(LOOK_EVERY)
        return judge(*arguments)

    detector.judge = unit.judge = slow  # which has been imported already


def until_killed(units: int) -> None:
    """Goes no further than before the last of so many units, and keeps each when it is done."""
    from kdad_dist.score import scoring

    until_asked(units)
    scoring.SAVE_EVERY = 0.0


def began(run: Path, units: int) -> bool:
    return (run / "began").is_file() and (run / "began").stat().st_size >= units


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("test split", signal.SIGTERM),
        ("held-out images", "PREEMPT"),
        ("new images", signal.SIGUSR1),
    ],
)
def test_scoring_that_is_asked_to_stop_ends_on_every_process(folder, tmp_path, what, ask):
    run, out = shutil.copytree(folder / "resnet", tmp_path / "run"), tmp_path / "out"
    shutil.rmtree(run / "scores", ignore_errors=True)
    (run / "scores").mkdir()
    (run / "scores/earlier").touch()
    words = {
        "test split": ["score.save_maps=npy"],
        "held-out images": ["score.standardise=true"],
        "new images": ["--images", folder / "images", "--out", out],
    }
    (run / "PREEMPT").touch()  # of an earlier command, and not a reason to stop
    units = 5 if what == "test split" else 1
    launched = Launched(["score", run, *words[what]], 2, first=partial(until_asked, units))
    # A process that has not begun is killed by a signal, as any other program.
    until(launched, lambda: began(run, units) and "1" in (run / "began").read_text())
    if ask == "PREEMPT":
        (run / ask).touch()
    else:
        launched.kill(ask, only=1)  # one process is enough
    (run / "asked").touch()
    outcome = launched.wait()
    assert outcome.codes == [75, 75], outcome.text
    assert outcome.text.count("start the same command again") == 1
    assert "PREEMPT" in outcome.text or "received SIG" in outcome.text
    assert [path.name for path in (run / "scores").iterdir()] == ["earlier"]
    assert not out.exists() and not out.with_name("out.partial").exists()
    assert (run / "scores.partial").exists() == (what == "test split")
    if what == "test split":
        outcome = succeeds("score", run, *words[what], processes=3)
        assert "going on: " in outcome.text
        assert not (run / "scores.partial").exists()
        stopped = results(run)
        succeeds("score", run, *words[what])
        assert stopped == results(run)


def test_killed_scoring_goes_on_with_the_sound_parts_of_the_same_work(folder, tmp_path):
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    parts = run / "scores.partial/parts"
    words = [run, "score.save_maps=npy", "score.standardise=true"]
    launched = Launched(["score", *words], 2, first=partial(until_killed, 11))
    until(launched, lambda: len(list(parts.glob("[!.]*"))) >= 5)
    launched.kill()
    launched.wait()
    other = shutil.copytree(run, tmp_path / "other")
    flipped, torn, *_ = parts.glob("[!.]*")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    os.truncate(torn, 99)
    torn.with_name(".left.tmp").touch()
    outcome = succeeds("score", *words, processes=3)
    assert "going on: " in outcome.text
    assert outcome.text.count("its images are scored again") == 2
    resumed = results(run)
    assert {name.split("/")[1] for name in resumed if "/" in name} == {
        *("scores.csv", "curves.json", "standard.safetensors", "examples", "maps")
    }
    succeeds("score", *words)
    assert resumed == results(run)

    outcome = succeeds("score", other, "score.save_maps=npy")
    assert "is scored anew: it is of another score" in outcome.text
    assert "going on" not in outcome.text


def test_fewer_test_images_than_processes_are_scored(folder, tmp_path):
    make_mvtec(tmp_path / "images", train=6, good=1, scratch=1)
    shards = tmp_path / "few"
    succeeds("pack", tmp_path / "images", shards, "--size", 32)
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    rows = []
    for processes in (4, 1):
        succeeds("score", run, "--shards", shards, "score.synthetic=false", processes=processes)
        [file] = run.glob("scores-few-*/scores.csv")
        rows.append(file.read_bytes())
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 1 + 2


def test_the_last_checkpoint_is_scored_beside_the_best(folder):
    run = folder / "resnet"
    succeeds("score", run, "score.checkpoint=last")
    metrics = json.loads((run / "metrics-last.json").read_text())
    assert metrics["provenance"]["checkpoint_rule"] == "last"
    assert metrics["provenance"]["checkpoint_step"] == 2
    assert (run / "scores-last/scores.csv").is_file()


def test_a_run_can_be_moved_and_scored_where_it_is(folder, tmp_path):
    run = shutil.copytree(folder / "resnet", tmp_path / "moved here")
    (run / "metrics.json").unlink(missing_ok=True)
    outcome = succeeds("score", run, "--json")
    assert (run / "metrics.json").is_file()
    assert '"image_auroc"' in outcome.text


def test_other_shards_get_results_of_their_own(folder, tmp_path):
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    succeeds("score", run)
    own = results(run)
    make_mvtec(tmp_path / "images", train=6, good=2, scratch=2)
    other = tmp_path / "other"
    succeeds("pack", tmp_path / "images", other, "--size", 32)
    index = json.loads((other / "index.json").read_text())
    name = f"-other-{index['fingerprint'][:8]}"
    outcome = succeeds("score", run, "--shards", other, processes=2)
    assert f"metrics{name}.json" in outcome.text
    assert "kdad report" not in outcome.text
    assert len((run / f"scores{name}/scores.csv").read_text().splitlines()) == 1 + 4
    succeeds("score", run, "--shards", other, "score.checkpoint=last")
    assert (run / f"metrics{name}-last.json").is_file()
    assert (run / f"scores{name}-last/scores.csv").is_file()
    assert results(run) == own

    moved = shutil.copytree(folder / "shards32", tmp_path / "moved")
    (run / "metrics.json").unlink()
    before = {path.name for path in run.iterdir()}
    succeeds("score", run, "--shards", moved)
    assert results(run).keys() == own.keys()
    assert {path.name for path in run.iterdir()} - before == {"metrics.json"}


def test_new_images_take_no_threshold_of_other_shards(folder, tmp_path):
    image = save_image(tmp_path / "new.png", texture(1))
    words = ["--images", image, "--shards", folder / "shards160"]
    outcome = kdad("score", folder / "resnet", *words)
    assert outcome.codes == [2]
    assert "leave out --shards" in outcome.text


def test_new_images_are_scored_where_the_shards_are_not(folder, tmp_path):
    run, shards = shutil.copytree(folder / "resnet", tmp_path / "run"), folder / "shards32"
    succeeds("score", run)
    image = save_image(tmp_path / "new.png", texture(1))
    shards.rename(folder / "away")
    try:
        outcome = succeeds("score", run, "--images", image)
        [row] = csv.DictReader((run / "predictions/predictions.csv").open())
        assert row["pred_label"] in {"0", "1"}, outcome.text
        (run / "data.json").unlink()
        outcome = kdad("score", run, "--images", image)
        assert outcome.codes == [1]
        assert f"{run / 'data.json'} is not there" in outcome.text
    finally:
        (folder / "away").rename(shards)


def test_a_category_without_defects_has_nulls_with_a_reason(folder, tmp_path):
    make_mvtec(tmp_path / "images", train=6, good=3, scratch=0)
    succeeds("pack", tmp_path / "images", tmp_path / "shards", "--size", 32)
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    succeeds("score", run, "--shards", tmp_path / "shards")
    [metrics] = run.glob("metrics-shards-*.json")
    category = json.loads(metrics.read_text())["categories"]["tile"]
    assert category["image_auroc"] is None
    assert "defective" in category["notes"]["image_auroc"]


def test_new_images_get_scores_maps_overlays_masks_and_boxes(folder, tmp_path):
    run = folder / "resnet"
    succeeds("score", run)
    save_image(tmp_path / "new/a b.png", texture(1, 60, 90))
    save_image(tmp_path / "new/deep/ü.jpg", texture(2, 50, 40))
    save_image(tmp_path / "other/a b.png", texture(3))
    out = tmp_path / "out"
    words = ["--images", tmp_path / "new", "--images", tmp_path / "other/*.png", "--out", out]
    outcome = succeeds("score", run, *words, processes=2)
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(rows) == 3
    anomalous = sum(row["pred_label"] == "1" for row in rows)
    assert outcome.text.count(f"3 images: {anomalous} anomalous, {3 - anomalous} normal") == 1
    pictures = [row["overlay"] for row in rows]
    assert pictures == [f"overlays/{name}.jpg" for name in ("a b", "ü", "a b~2")]
    for row in rows:
        assert float(row["pred_score"]) > 0
        assert row["pred_label"] in {"0", "1"}
        width, height = Image.open(row["file"]).size
        assert Image.open(out / row["overlay"]).size == (width, height)
        mask = np.asarray(Image.open(out / row["mask"]))
        assert mask.shape == (height, width)
        boxes = json.loads(row["boxes"])
        assert bool(boxes) == bool(mask.any())
        assert all(0 <= left < right <= width for left, _, right, _ in boxes)
        map_ = Image.open(out / row["map"])
        assert map_.size == (32, 32)
        assert float(map_.text["scale"]) > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_text("no image at all"), "note.png"),
        (lambda p: p.write_bytes(b""), "note.png"),
        (lambda p: p.with_suffix(".heic").write_bytes(b"a picture"), "note.heic"),
        (lambda p: p.with_suffix(".txt").write_text("x"), "no image"),
    ],
)
def test_a_new_image_that_is_none_is_named_and_nothing_is_left(folder, tmp_path, make, said):
    (tmp_path / "new").mkdir()
    make(tmp_path / "new/note.png")
    out = tmp_path / "out"
    words = ["--images", tmp_path / "new", "--out", out]
    processes = 2 if said == "no image" else 1
    outcome = kdad("score", folder / "resnet", *words, processes=processes)
    assert outcome.codes == [1] * processes
    assert outcome.text.count(said) == 1
    assert not out.exists()


def while_more_come() -> None:
    """No process sees files of the others in a folder, and where any but the main one looks for
    images, there is one more by then.
    """
    from kdad_dist import predict

    rank, find, glob = os.environ["RANK"], predict.find_images, Path.glob

    def late(patterns, out):
        if rank != "0":
            save_image(Path(patterns[0]) / "late.png", texture(9))
        return find(patterns, out)

    def lagging(path, pattern):
        shown = glob(path, pattern)
        return (p for p in shown if not p.name.startswith("rank_") or int(p.stem[5:]) == int(rank))

    predict.find_images = late
    Path.glob = lagging  # type: ignore[method-assign]


def test_each_new_image_is_scored_once_whatever_else_changes_in_folders(folder, tmp_path):
    new, out = tmp_path / "new", tmp_path / "new/judged"
    wanted = [save_image(new / name, texture(1)) for name in ("a.png", "b.jfif", "deep/c.png")]
    (new / "._a.png").write_bytes(b"what macOS leaves")
    save_image(out / "overlays/a.jpg", texture(2))
    (out / "predictions.csv").touch()
    words = ["--images", new, "--out", out]
    outcome = kdad("score", folder / "resnet", *words, processes=2, first=while_more_come)
    assert outcome.codes == [0, 0], outcome.text
    assert outcome.text.count(f"not used: 1 image in {out}") == 1
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["file"] for row in rows] == [str(path) for path in wanted]
    assert not list(out.glob("rank_*"))


def test_a_folder_that_holds_something_else_is_not_overwritten(folder, tmp_path):
    image = save_image(tmp_path / "new.png", texture(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    words = ["--images", image, "--out", tmp_path / "out"]
    for first in (None, "predictions.csv"):  # nor where a table of ours lies beside it
        if first:
            (tmp_path / "out" / first).touch()
        outcome = kdad("score", folder / "resnet", *words)
        assert outcome.codes == [1]
        assert (tmp_path / "out/precious").exists()


def test_an_empty_folder_may_be_filled(folder, tmp_path):
    image = save_image(tmp_path / "new.png", texture(1))
    (tmp_path / "out").mkdir()
    succeeds("score", folder / "resnet", "--images", image, "--out", tmp_path / "out")
    assert (tmp_path / "out/predictions.csv").is_file()


def test_a_threshold_of_other_scores_is_not_used(folder, tmp_path):
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    succeeds("score", run)
    image = save_image(tmp_path / "new.png", texture(1))
    for words, label in ((["score.batch_size=2"], True), (["score.smooth_sigma=0"], False)):
        outcome = succeeds("score", run, *words, "--images", image)
        [row] = csv.DictReader((run / "predictions/predictions.csv").open())
        assert bool(row["pred_label"]) == bool(row["mask"]) == label
        assert ("no threshold" in outcome.text) != label


def ask_for_bf16() -> None:
    """As `accelerate launch --mixed_precision bf16` does."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def test_a_precision_of_the_launcher_that_would_be_ignored_is_refused(folder, tmp_path):
    image = save_image(tmp_path / "new.png", texture(1))
    for words in ([], ["--images", image]):
        outcome = kdad("score", folder / "resnet", *words, first=ask_for_bf16)
        assert outcome.codes == [2]
        assert "score.precision is no" in outcome.text


@pytest.mark.parametrize("words", [["score"], ["export"], ["report"]])
def test_a_directory_that_is_no_run_is_refused(tmp_path, words):
    outcome = kdad(*words, tmp_path)
    assert outcome.codes[0] in {1, 2}
    assert "config.yaml" in outcome.text
    assert "Traceback" not in outcome.text


def test_an_export_holds_lora_merged_and_another_run_starts_from_it(folder, tmp_path):
    run = folder / "mae"
    outcome = succeeds("export", run)
    manifest = json.loads((run / "export/manifest.json").read_text())["student.safetensors"]
    assert manifest["lora_merged"]
    for said in ("; the others have LoRA merged", "on 4 of 7 test images:", "_map: largest"):
        assert said in outcome.text
    exported = load_file(run / "export/student.safetensors")
    assert not [name for name in exported if "lora" in name]
    file = run / "export/student.safetensors"
    merged = load(
        folder / "mae.yaml",
        [
            f"method.weights={file}",
            "method.lora=null",
            "method.freeze_non_lora=false",
            "method.freeze_random=false",
        ],
    )
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = build_method(merged).eval().predict(image).reconstruction
        adapted = restore(load_run(run)).method.predict(image).reconstruction
    torch.testing.assert_close(plain, adapted, rtol=0, atol=1e-5)
    output = tmp_path / "next"
    words = [f"output={output}", f"method.weights={file}", "method.freeze_random=false"]
    succeeds("train", folder / "mae.yaml", *words)
    succeeds("export", output)
    assert load_file(output / "export/student.safetensors").keys() == exported.keys()


def test_an_export_without_lora_says_so(folder):
    succeeds("export", folder / "resnet")
    manifest = json.loads((folder / "resnet/export/manifest.json").read_text())
    assert not manifest["student.safetensors"]["lora_merged"]


def test_a_flipped_bit_in_a_shard_is_refused_by_name(folder, tmp_path):
    shards = shutil.copytree(folder / "shards32", tmp_path / "shards")
    shard = max(shards.glob("*test*.tar"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[700] ^= 4
    shard.write_bytes(content)
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    outcome = kdad("score", run, "--shards", shards)
    assert outcome.codes == [1]
    assert shard.name in outcome.text
    assert "Traceback" not in outcome.text


def test_scoring_asks_for_a_checkpoint_where_there_is_none(folder, tmp_path):
    run = shutil.copytree(folder / "resnet", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    outcome = kdad("score", run)
    assert outcome.codes == [1]
    assert "train the run first" in outcome.text


def test_scoring_another_choice_of_categories_leaves_the_results_of_the_run_alone(folder):
    run = folder / "resnet"
    succeeds("score", run)
    before = (run / "metrics.json").read_bytes()
    succeeds("score", run, "data.category=tile")
    assert (run / "metrics.json").read_bytes() == before
    assert (run / "metrics-tile.json").is_file() and (run / "scores-tile").is_dir()
