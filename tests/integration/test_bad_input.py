"""Every bad input: one message with its name and the remedy, exit code 1 or 2, no half work."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import header_of_png, make_mvtec, save_image, square_mask, texture
from tests.kdad import Launched, Outcome, as_nobody, kdad, limit_files, succeeds, until
from tests.launcher import wait_for

pytestmark = pytest.mark.launch


def refused(outcome: Outcome, *said: str, code: int = 1) -> None:
    """One message, which says this and the remedy; no traceback; the code.

    Of several processes, one may fail alone; the launcher then ends the others.
    """
    assert {code} <= set(outcome.codes) <= {code, -signal.SIGKILL}, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert outcome.text.count("kdad: ") == 1, outcome.text
    problem, arrow, remedy = outcome.text.partition("kdad: ")[2].partition("\n  -> ")
    assert problem and arrow and remedy, outcome.text
    for words in said:
        assert words in outcome.text, f"{words!r} is not in:\n{outcome.text}"


def encoded(file_format: str, frames: int = 1) -> bytes:
    """A sound image of so many frames or pages."""
    file = io.BytesIO()
    first, *others = (Image.fromarray(texture(i)) for i in range(frames))
    first.save(file, file_format, save_all=frames > 1, append_images=others)
    return file.getvalue()


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(run: Path) -> dict[str, bytes]:
    """What stands in a run, but for the parts that the next scoring would go on from."""
    return {name: data for name, data in contents(run).items() if ".partial/" not in name}


# ---- images and folders --------------------------------------------------------------------------

IMAGE, MASK = "test/scratch/001.png", "ground_truth/scratch/001_mask.png"
PNG = encoded("PNG")
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty image": (overwrite(IMAGE, b""), [IMAGE, "is empty"]),
    "truncated image": (overwrite(IMAGE, PNG[:-900]), [IMAGE, "cannot be decoded"]),
    "corrupt image": (overwrite(IMAGE, PNG[:400] + b"?" + PNG[401:]), [IMAGE, "cannot be decoded"]),
    "text named png": (overwrite(IMAGE, b"a note\n"), [IMAGE, "not an image of a known format"]),
    "bomb": (overwrite(IMAGE, header_of_png(60_000, 60_000)), [IMAGE, "pixels", "smaller"]),
    "animated": (overwrite(IMAGE, encoded("WEBP", 3)), [IMAGE, "3 frames or pages"]),
    "pages": (overwrite(IMAGE, encoded("TIFF", 2)), [IMAGE, "2 frames or pages"]),
    "unknown format": (
        overwrite("train/good/a.heic", b"heic"),
        ["a.heic", "not an image of a known format"],
    ),
    "mask missing": (lambda root: (root / MASK).unlink(), [IMAGE, "has no mask"]),
    "mask of another size": (
        lambda root: save_image(root / MASK, square_mask(20, 24)),
        [MASK, "24 x 20 pixels", IMAGE],
    ),
    "mask all empty": (
        lambda root: save_image(root / MASK, np.zeros((40, 48), np.uint8)),
        [MASK, "marks no pixels", IMAGE],
    ),
    "mask corrupt": (overwrite(MASK, PNG[:-900]), [MASK, "cannot be decoded"]),
    "two samples with one key": (
        lambda root: Image.fromarray(texture(5)).save(root / "train/good/000.jpg"),
        ["train/good/000.png", "would have the same key"],
    ),
    "named pipe": (lambda root: os.mkfifo(root / "train/good/x.png"), ["x.png", "not a file"]),
    "dangling link": (
        lambda root: (root / "train/good/x.png").symlink_to("nowhere"),
        ["x.png", "No such file"],
    ),
    "a name that is not UTF-8": (
        lambda root: (root / "train/good" / os.fsdecode(b"\xff.png")).write_bytes(b""),
        ["is empty"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_file_stops_a_pack_by_name(tmp_path, case):
    damage, said = BAD_FOLDERS[case]
    root, out = make_mvtec(tmp_path / "in"), tmp_path / "out"
    damage(root)
    refused(kdad("pack", root, out, "--size", 32), *said)
    assert not (out / "index.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_skip_bad_lists_what_it_skipped_and_goes_on(tmp_path):
    for number, (damage, _) in enumerate(BAD_FOLDERS.values()):
        damage(make_mvtec(tmp_path / "in", category=f"tile{number:02}"))
    words = ["pack", tmp_path / "in", tmp_path / "out", "--size", 32, "--skip-bad"]
    outcome = succeeds(*words, "--json")
    listed = [line for line in outcome.text.splitlines() if line.startswith("skipped: ")]
    assert len(listed) == len(BAD_FOLDERS), outcome.text
    for number, (line, (_, said)) in enumerate(zip(listed, BAD_FOLDERS.values(), strict=True)):
        assert line.startswith(f"skipped: tile{number:02}/"), outcome.text
        assert said[-1] in line or said[1] in line, line
    assert len(json.loads(outcome.text[outcome.text.index("{\n") :])["skipped"]) == len(listed)
    assert "packed already" in succeeds(*words).text
    succeeds("verify", tmp_path / "out", "--decode")


def test_odd_names_go_all_the_way_to_scores_and_maps(config, tmp_path):
    root = make_mvtec(tmp_path / "in", category="Fließe 平 v2.0")
    for split in ("train/good", "test/good"):
        for name in ("good.v2.000", "good.v2.001", "x" * 240, "ü" * 120, "a  b", "-rf", "%2E"):
            save_image(root / split / f"{name}.png", texture(len(name)))
    succeeds("pack", root, tmp_path / "out", "--size", 32)
    copy = tmp_path / "run"
    succeeds("train", config, f"output={copy}", f"data.shards={tmp_path / 'out'}")
    succeeds("score", copy, "score.save_maps=png")
    assert len(list((copy / "scores/maps").glob("*.png"))) == 3 + 4 + 7
    succeeds("report", copy)
    words = ["--images", root / "test/good", "--out", tmp_path / "new"]
    succeeds("score", copy, *words)
    assert len(list((tmp_path / "new/overlays").iterdir())) == 3 + 7


def no_train_good(root: Path) -> None:
    (root / "train/good").rename(root / "train/fine")


BAD_ROOTS: dict[str, tuple[Callable[[Path], object], list[str], int]] = {
    "no train/good": (no_train_good, ["train/good", "(mvtec)"], 1),
    "missing": (shutil.rmtree, ["does not exist"], 1),
    "a file": (lambda root: (shutil.rmtree(root), root.write_text("")), ["is not a folder"], 1),
    "empty": (lambda root: (shutil.rmtree(root), root.mkdir()), ["holds nothing"], 1),
    "no image": (
        lambda root: [path.unlink() for path in root.rglob("*.png")],
        ["holds no image", "png"],
        1,
    ),
    "nothing but bad images": (
        lambda root: [path.write_bytes(b"") for path in root.rglob("*.png")],
        ["is empty"],
        1,
    ),
}


@pytest.mark.parametrize("case", BAD_ROOTS)
def test_a_folder_without_use_is_refused_and_leaves_nothing(tmp_path, case):
    damage, said, code = BAD_ROOTS[case]
    root = make_mvtec(tmp_path / "in")
    damage(root)
    refused(kdad("pack", root, tmp_path / "out"), str(root), *said, code=code)
    assert not (tmp_path / "out").exists()


def test_an_unknown_category_is_refused_with_the_choices(tmp_path):
    root = make_mvtec(tmp_path / "in").parent
    outcome = kdad("pack", root, tmp_path / "out", "--category", "tiel")
    refused(outcome, "tiel", "choose from: tile", code=2)


def foreign(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


BAD_OUTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "something else": (foreign, ["holds something else: thesis.tex", "choose"]),
    "a file": (lambda out: out.write_text("precious"), ["is not a folder", "choose"]),
    "another data set": (
        lambda out: succeeds("pack", make_mvtec(out.parent / "b"), out, "--size", 16),
        ["holds another data set", "image_size is 16"],
    ),
    "an index of another version": (
        lambda out: (out.mkdir(), (out / "index.json").write_text('{"version": 9}')),
        ["version 9", "version 1"],
    ),
    "below a file": (
        lambda out: (out.parent / "file").write_text(""),
        ["file", "Not a directory"],
    ),
}


@pytest.mark.parametrize("case", BAD_OUTS)
def test_out_that_holds_something_is_refused_and_untouched(tmp_path, case):
    prepare, said = BAD_OUTS[case]
    root, out = make_mvtec(tmp_path / "in"), tmp_path / "out"
    prepare(out)
    before = contents(tmp_path)
    place = tmp_path / "file/out" if case == "below a file" else out
    refused(kdad("pack", root, place, "--size", 32), str(place), *said)
    assert contents(tmp_path) == before


@pytest.mark.starves
def test_a_full_disk_stops_a_pack_which_then_goes_on(tmp_path):
    root, out = make_mvtec(tmp_path / "in"), tmp_path / "out"
    outcome = kdad("pack", root, out, "--size", 256, first=partial(limit_files, 20_000))
    refused(outcome, str(out), "File too large", "goes on")
    assert not (out / "index.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    succeeds("pack", root, out, "--size", 256)
    succeeds("verify", out)


@pytest.mark.starves
def test_what_a_user_may_not_read_or_write_is_named(open_folder):
    root = make_mvtec(open_folder / "in")
    (open_folder / "closed").mkdir(mode=0o555)
    outcome = kdad("pack", root, open_folder / "closed/out", first=as_nobody)
    refused(outcome, "closed/out", "Permission denied")
    succeeds("pack", root, open_folder / "out", "--size", 32)
    shard = sorted((open_folder / "out").glob("*.tar"))[0]
    shard.chmod(0)
    outcome = kdad("verify", open_folder / "out", first=as_nobody)
    refused(outcome, shard.name, "Permission denied")
    (root / "train/good/001.png").chmod(0)
    outcome = kdad("pack", root, open_folder / "new", first=as_nobody)
    refused(outcome, "train/good/001.png", "Permission denied")
    assert not (open_folder / "new").exists()
    root.chmod(0)
    outcome = kdad("pack", root, open_folder / "new", first=as_nobody)
    refused(outcome, str(root), "make it readable")
    root.chmod(0o755)


# ---- shards --------------------------------------------------------------------------------------

CONFIG = {
    "name": "bad",
    "data": {"image_size": 32},
    "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]}},
    "optim": {"name": "adam", "lr": 1.0e-3},
    "train": {"steps": 3, "batch_size": 4, "log_every": 1, "check_every": 1},
    "score": {"smooth_sigma": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained and scored run, which its tests copy; shards and config lie beside it."""
    folder = tmp_path_factory.mktemp("bad")
    make_mvtec(folder / "images", train=10)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    data = {**CONFIG["data"], "shards": str(folder / "shards")}
    (folder / "bad.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))
    succeeds("train", folder / "bad.yaml", f"output={folder / 'run'}")
    succeeds("score", folder / "run")
    return folder / "run"


@pytest.fixture
def config(run) -> Path:
    return run.parent / "bad.yaml"


def first_shard(shards: Path, split: str) -> Path:
    return sorted(shards.glob(f"*-{split}-*.tar"))[0]


def truncate(shards: Path) -> None:
    for split in ("train", "test"):
        shard = first_shard(shards, split)
        shard.write_bytes(shard.read_bytes()[:3000])


def flip_bits(shards: Path) -> None:
    for split in ("train", "test"):
        flip(first_shard(shards, split), 700)


def swap(shards: Path) -> None:
    one, two = first_shard(shards, "train"), first_shard(shards, "test")
    one.rename(shards / "aside")
    two.rename(one)
    (shards / "aside").rename(two)


def change_version(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "version": 9}))


def remove_shards(shards: Path) -> None:
    for shard in shards.glob("*.tar"):
        shard.unlink()


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, ".tar"),
    "bit flipped": (flip_bits, ".tar"),
    "swapped": (swap, ".tar"),
    "shards missing": (remove_shards, ".tar"),
    "of another version": (change_version, "version 9"),
    "index missing": (lambda shards: (shards / "index.json").unlink(), "index.json"),
    "index senseless": (lambda shards: (shards / "index.json").write_text("{"), "index.json"),
    "samples changed": (lambda shards: flip(shards / "samples.jsonl", 50), "samples.jsonl"),
    "missing": (shutil.rmtree, "shards does not exist"),
}


@pytest.mark.parametrize(
    ("case", "access"),
    [*((case, "indexed") for case in BAD_SHARDS), ("truncated", "stream"), ("swapped", "stream")],
)
def test_bad_shards_stop_training_by_name(config, tmp_path, case, access):
    damage, said = BAD_SHARDS[case]
    shards = shutil.copytree(config.parent / "shards", tmp_path / "shards")
    damage(shards)
    out = tmp_path / "out"
    words = [f"data.shards={shards}", f"data.access={access}", f"output={out}"]
    words += ["data.image_size=24"]  # of which nothing is in the cache yet
    refused(kdad("train", config, *words, processes=2), str(shards), said)
    assert not list(out.glob("checkpoints/*"))


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_stop_scoring_and_are_found_by_verify(run, tmp_path, case):
    damage, said = BAD_SHARDS[case]
    shards = shutil.copytree(run.parent / "shards", tmp_path / "shards")
    damage(shards)
    copy = shutil.copytree(run, tmp_path / "run")
    before = contents(copy)
    refused(kdad("score", copy, "--shards", shards), str(shards), said)
    assert results(copy) == before
    refused(kdad("verify", shards), str(shards), said)


def test_a_run_whose_shards_are_gone_says_so_in_its_status(run, config, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    words = [f"data.shards={tmp_path / 'gone'}", "train.changed_config=accept"]
    refused(kdad("train", config, f"output={copy}", *words, processes=2), str(tmp_path / "gone"))
    before, after = (json.loads((r / "status.json").read_text()) for r in (run, copy))
    assert after["state"] == "failed"
    assert str(tmp_path / "gone") in after["reason"]
    assert after["step"] == before["step"] > 0
    assert (copy / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


# ---- configurations, weights, run directories ----------------------------------------------------


def save_weights(config: Path) -> None:
    """Files of weights beside the config: of another shape, and without deeper layers."""
    from kdad_dist.models.backbone import build_backbone

    network = build_backbone("resnet10t", "random", [1, 2], 0)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(
        {k: v for k, v in state.items() if "layer2" not in k}, config.parent / "short.safetensors"
    )
    wide = {k: torch.cat([v, v]) if v.ndim == 4 else v for k, v in state.items()}
    save_file(wide, config.parent / "wide.safetensors")
    (config.parent / "text.safetensors").write_text("no weights")


BAD_WORDS: dict[str, tuple[list[str], list[str], int]] = {
    "unknown key": (
        ["train.batchsize=4"],
        ["train.batchsize", "did you mean train.batch_size?"],
        2,
    ),
    "several wrong values": (
        ["optim.lr=-1", "data.val_fraction=2", "train.batch_size=many", "sed=1"],
        ["optim.lr", "data.val_fraction", "train.batch_size", "did you mean seed?", "4 problems"],
        2,
    ),
    "zero epochs": (["train.steps=null", "train.epochs=0"], ["train.epochs", "found 0"], 2),
    "no such category": (["data.category=tiel"], ["tiel", "choose from: tile"], 2),
    "weights that lack layers": (
        ["method.teacher.weights={folder}/short.safetensors"],
        ["short.safetensors", "does not hold layer 2", "missing"],
        1,
    ),
    "weights of other shapes": (
        ["method.teacher.weights={folder}/wide.safetensors"],
        ["wide.safetensors", "shape (", "needed ("],
        1,
    ),
    "weights that are none": (
        ["method.teacher.weights={folder}/text.safetensors"],
        ["text.safetensors"],
        1,
    ),
    "weights missing": (["method.teacher.weights=absent.pth"], ["absent.pth"], 1),
    "start weights missing": (["train.init_from=a.pth"], ["a.pth", "train.init_from"], 1),
    "start weights of other shapes": (
        ["train.init_from={folder}/wide.safetensors"],
        ["train.init_from", "shape ("],
        1,
    ),
    "larger images than packed": (["data.image_size=64"], ["--size 64"], 2),
    "unknown backbone": (["method.teacher.backbone=resnet19"], ["resnet19", "resnet18"], 2),
    "layers that are not there": (["method.teacher.layers=[1, 9]"], ["layers is [1, 9]"], 2),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_a_wrong_word_is_refused_once_and_nothing_is_trained(config, tmp_path, case):
    words, said, code = BAD_WORDS[case]
    if not (config.parent / "text.safetensors").exists():
        save_weights(config)
    words = [word.format(folder=config.parent) for word in words]
    out = tmp_path / "out"
    refused(kdad("train", config, f"output={out}", *words, processes=2), *said, code=code)
    assert not list(out.glob("checkpoints/*"))


def test_no_training_image_is_refused(config, tmp_path):
    root = make_mvtec(tmp_path / "in", train=1)
    (root / "train/good/000.png").unlink()
    succeeds("pack", root, tmp_path / "shards", "--size", 32)
    words = [f"data.shards={tmp_path / 'shards'}", f"output={tmp_path / 'out'}"]
    outcome = kdad("train", config, *words, processes=2)
    refused(outcome, str(tmp_path / "shards"), "no normal training image")


def test_a_run_of_another_configuration_is_refused_by_key_and_untouched(run, config, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before = contents(copy)
    outcome = kdad("train", config, f"output={copy}", "optim.lr=0.5", "seed=3", processes=2)
    refused(outcome, "optim.lr: 0.001 in the run, 0.5 now", "seed: 0 in the run", code=2)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("verb", "processes"),
    [*((verb, n) for verb in ("train", "score", "predict") for n in (1, 2)), ("export", 1)],
)
@pytest.mark.starves
def test_a_run_that_may_not_be_written_is_named(run, config, open_folder, verb, processes):
    copy = shutil.copytree(run, open_folder / "run")
    shards = shutil.copytree(run.parent / "shards", open_folder / "shards")
    image = save_image(open_folder / "a.png", texture(1))
    words = {
        "train": ["train", shutil.copy(config, open_folder), f"output={copy}"],
        "score": ["score", copy, "--shards", shards],
        "predict": ["score", copy, "--images", image],
        "export": ["export", copy],
    }[verb]
    if verb == "train":
        words += [f"data.shards={shards}", "train.changed_config=accept"]
    before = contents(copy)
    paths = [copy, *copy.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & 0o555)
    outcome = kdad(*words, processes=processes, first=as_nobody)
    refused(outcome, str(copy), "Permission denied")
    assert contents(copy) == before
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode)  # so that the folder can be removed


@pytest.mark.parametrize(
    ("verb", "processes"),
    [*((verb, n) for verb in ("train", "score", "predict") for n in (1, 2)), ("export", 1)],
)
@pytest.mark.starves
def test_a_full_disk_is_named_and_leaves_what_was_there(run, config, tmp_path, verb, processes):
    copy = shutil.copytree(run, tmp_path / "run")
    image = save_image(tmp_path / "a.png", texture(1, 400, 400))
    words = {
        "train": ["train", config, f"output={copy}", "train.steps=6", "data.cache=none"],
        "score": ["score", copy, "score.save_maps=npy"],
        "predict": ["score", copy, "--images", image],
        "export": ["export", copy],
    }[verb]
    words += ["train.changed_config=accept"] if verb == "train" else []
    before = contents(copy)
    largest = 4000 if verb == "score" else 20_000
    outcome = kdad(*words, processes=processes, first=partial(limit_files, largest))
    refused(outcome, str(tmp_path), "full?" if verb == "score" else "File too large")
    left = results(copy)
    if verb == "train":
        assert [name for name in left if name.startswith("checkpoints/")] == [
            name for name in before if name.startswith("checkpoints/")
        ]
    else:
        assert left == before


@pytest.mark.starves
def test_a_cache_without_room_names_the_ways_out(config, tmp_path):
    words = ["train", config, f"output={tmp_path / 'out'}", "data.image_size=16"]
    outcome = kdad(*words, processes=2, first=partial(limit_files, 3000))
    refused(outcome, "MiB in", "KDAD_CACHE", "data.cache=none")


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        *(("config.yaml", verb) for verb in ("train", "score", "export", "report")),
        *(("metrics.json", verb) for verb in ("predict", "report")),
        ("data.json", "predict"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, config, tmp_path, name, verb):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).write_text('{"threshold": ')
    words = {
        "train": ["train", config, f"output={copy}"],
        "predict": ["score", copy, "--images", save_image(tmp_path / "a.png", texture(1))],
    }.get(verb, [verb, copy])
    code = 2 if name == "config.yaml" and verb != "report" else 1
    refused(kdad(*words, processes=1), str(copy / name), code=code)


# ---- Ctrl-C --------------------------------------------------------------------------------------


def interrupt(launched: Launched, once: Callable[[], bool]) -> Outcome:
    until(launched, once)
    launched.kill(signal.SIGINT)
    return launched.wait()


def interrupted(outcome: Outcome) -> None:
    assert set(outcome.codes) == {130}, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert outcome.text.count("kdad: interrupted") == 1, outcome.text


def test_an_interrupted_pack_leaves_whole_shards_and_goes_on(tmp_path):
    root, out = make_mvtec(tmp_path / "in", train=100), tmp_path / "out"
    launched = Launched(["pack", root, out, "--size", 400, "--workers", 1], 1)
    interrupted(interrupt(launched, lambda: bool(list(out.glob("*.tar")))))
    assert not (out / "index.json").exists()
    assert not list(out.rglob("*.tmp"))
    assert "packed already" not in succeeds("pack", root, out, "--size", 400).text
    succeeds("verify", out)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_training_saves_and_goes_on(config, tmp_path, processes):
    out = tmp_path / "out"
    words = ["train", config, f"output={out}", "checkpoint.every_steps=2"]
    launched = Launched([*words, "train.steps=5000", "train.validate_every=9999"], processes)
    outcome = interrupt(launched, lambda: bool(list(out.glob("checkpoints/step_*"))))
    assert outcome.codes == [75] * processes, outcome.text
    assert "received SIGINT: stopping in order" in outcome.text
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "preempted"
    more = [f"train.steps={status['step'] + 2}", "train.changed_config=accept"]
    outcome = succeeds(*words, *more, processes=processes)
    assert f"going on from step {status['step']} of" in outcome.text


def say_what_is_heard() -> None:
    """Has each process leave a file when it has heard of a Ctrl-C."""
    from kdad_dist.runtime.stopping import StopRequest

    [run] = [word.removeprefix("output=") for word in sys.argv if word.startswith("output=")]
    note = StopRequest._note

    def note_and_say(self: StopRequest, number: int, frame: Any) -> None:
        note(self, number, frame)
        Path(f"{run}.heard{os.environ.get('RANK', 0)}").touch()

    StopRequest._note = note_and_say


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_ctrl_c_ends_a_training_at_once(config, tmp_path, processes):
    out = tmp_path / "out"
    words = ["train", config, f"output={out}", "checkpoint.every_steps=2", "train.steps=90000"]
    # The processes would agree on the first one only after many thousand steps.
    launched = Launched([*words, "train.check_every=100000"], processes, say_what_is_heard)
    until(launched, lambda: bool(list(out.glob("checkpoints/step_*"))))
    launched.kill(signal.SIGINT)
    heard = [tmp_path / f"out.heard{rank}" for rank in range(processes)]
    interrupted(interrupt(launched, lambda: all(file.exists() for file in heard)))
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "interrupted")


def score_until_asked() -> None:
    """Says which process has begun to score, and lets none come further before a file is there."""
    from kdad_dist.score import unit

    judge, run = unit.judge, sys.argv[2]

    def slow(*arguments: Any) -> Any:
        with Path(f"{run}.begun").open("a") as file:
            file.write(os.environ.get("RANK", "0"))
        wait_for(Path(f"{run}.asked").exists)
        return judge(*arguments)

    unit.judge = slow


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_scoring_leaves_what_was_there(run, tmp_path, processes):
    copy, begun = shutil.copytree(run, tmp_path / "run"), tmp_path / "run.begun"
    before = contents(copy)
    launched = Launched(["score", copy], processes, score_until_asked)
    until(launched, lambda: begun.exists() and len({*begun.read_text()}) == processes)
    launched.kill(signal.SIGINT)
    (tmp_path / "run.asked").touch()
    interrupted(launched.wait())
    assert results(copy) == before
