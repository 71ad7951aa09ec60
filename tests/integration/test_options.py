"""Each option of a training, used for real on a small data set."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from kdad_dist.errors import UsageError
from kdad_dist.runtime.launch import check_compiler
from tests.bundles import make_mnist
from tests.helpers import make_mvtec, save_image, texture
from tests.kdad import kdad, stops, succeeds, weights
from tests.needs import require_or_skip

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    make_mvtec(folder / "images", category="tile", train=14)
    make_mvtec(folder / "images", category="wood", train=6)
    succeeds("pack", folder / "images", folder / "shards", "--size", 32)
    teacher = {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]}
    text = {
        "name": "options",
        "data": {"shards": str(folder / "shards"), "image_size": 32, "category": "tile"},
        "method": {"teacher": teacher},
        "optim": {"name": "adam", "lr": 1.0e-3},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1},
    }
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(text))
    succeeds("train", path, f"output={folder / 'plain'}")
    return path


def trained(config: Path, name: str, *overrides: str, processes: int = 1) -> Path:
    run = config.parent / name
    succeeds("train", config, f"output={run}", *overrides, processes=processes)
    return run


def records(run: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("cache", ["none", "device"])
def test_where_pixels_are_kept_changes_nothing(config, cache):
    assert records(trained(config, f"cache-{cache}", f"data.cache={cache}")) == records(
        config.parent / "plain"
    )


def test_cached_features_of_the_teacher_train_the_same_student(config):
    cached = records(trained(config, "cached", "method.cache_teacher=true"))
    assert cached == pytest.approx(records(config.parent / "plain"), abs=1e-5)


def test_streamed_shards_train_and_resume_to_the_same_weights(config):
    once = trained(config, "stream", "data.access=stream", processes=2)
    assert len(records(once)) == len(records(config.parent / "plain"))
    run = config.parent / "stream-stopped"
    words = ["train", config, f"output={run}", "data.access=stream"]
    assert stops(*words, processes=2) > 0
    succeeds(*words, processes=2)
    assert records(run) == records(once)
    assert weights(run) == weights(once)


def test_streaming_and_a_cache_of_features_exclude_each_other(config):
    words = ["data.access=stream", "method.cache_teacher=true", f"output={config.parent / 'no'}"]
    outcome = kdad("train", config, *words)
    assert outcome.codes == [2]
    assert "random access" in outcome.text


def test_bfloat16_trains_about_the_same(config):
    low = records(trained(config, "bf16", "train.precision=bf16"))
    assert low == pytest.approx(records(config.parent / "plain"), rel=0.02)


def test_float16_without_a_gpu_is_refused(config):
    outcome = kdad("train", config, f"output={config.parent / 'no'}", "train.precision=fp16")
    assert outcome.codes == [2]
    assert "needs a GPU" in outcome.text


def test_one_model_is_trained_on_several_categories(config):
    run = trained(config, "both", "data.category=[tile, wood]")
    succeeds("score", run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["categories"]) == {"tile", "wood"}
    values = [category["pixel_auroc"] for category in metrics["categories"].values()]
    assert metrics["mean"]["pixel_auroc"] == pytest.approx(sum(values) / 2)


def test_an_unknown_category_names_the_known_ones(config):
    outcome = kdad("train", config, f"output={config.parent / 'no'}", "data.category=wod")
    assert outcome.codes == [2]
    assert "tile, wood" in outcome.text


def test_one_class_is_normal_and_the_others_are_not(config, tmp_path):
    for split, name in ((s, n) for s in ("train", "test") for n in ("cat", "dog", "frog")):
        for i in range(6):
            save_image(tmp_path / f"images/{split}/{name}/{i}.png", texture(i, 32, 32))
    shards = tmp_path / "shards"
    succeeds("pack", tmp_path / "images", shards, "--size", 32)
    words = [f"data.shards={shards}", "data.category=all"]
    refused = kdad("train", config, *words, f"output={tmp_path / 'no'}")
    assert refused.codes == [2]
    assert "cat, dog, frog" in refused.text
    run = tmp_path / "run"
    succeeds("train", config, *words, "data.normal_class=dog", f"output={run}")
    succeeds("score", run)
    [category] = json.loads((run / "metrics.json").read_text())["categories"].values()
    assert set(category["defect_types"]) == {"cat", "frog"}
    assert category["image_auroc"] is not None
    assert category["pixel_auroc"] is None
    assert "mask" in category["notes"]["pixel_auroc"]


def test_a_digit_of_mnist_is_normal_and_the_others_are_not(config, tmp_path):
    root = make_mnist(
        tmp_path / "mnist", train=(3,) * 8 + (5, 0), test=(3, 5, 3, 0, 5, 7), suffix=".gz"
    )
    succeeds("pack", root, tmp_path / "shards", "--size", 32)
    words = ["train", config, f"data.shards={tmp_path / 'shards'}", "data.category=mnist"]
    run = tmp_path / "run"
    for wrong, code, answer in (
        ("13", 2, "choose from: 0, 3, 5, 7"),
        ("7", 1, "no training image of the class 7"),
        ("[3]", 2, "data.normal_class"),
    ):
        refused = kdad(*words, f"data.normal_class={wrong}", f"output={tmp_path / 'no'}")
        assert refused.codes == [code]
        assert answer in refused.text
    succeeds(*words, "data.normal_class=3", f"output={run}")
    succeeds("score", run)
    [category] = json.loads((run / "metrics.json").read_text())["categories"].values()
    assert set(category["defect_types"]) == {"0", "5", "7"}
    assert category["image_auroc"] is not None


def test_a_training_starts_from_an_export(config):
    first = config.parent / "plain"
    weights(first)
    file = first / "export/student.safetensors"
    run = trained(config, "from", f"train.init_from={file}", "optim.lr=1e-12", "train.epochs=1")
    weights(run)
    before, after = load_file(file), load_file(run / "export/student.safetensors")
    parameter = "network.layer1.0.conv1.weight"
    assert abs(before[parameter] - after[parameter]).max() < 1e-9


def test_an_export_with_a_flipped_bit_is_refused(config, tmp_path):
    weights(config.parent / "plain")
    folder = shutil.copytree(config.parent / "plain/export", tmp_path / "export")
    content = bytearray((folder / "student.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "student.safetensors").write_bytes(content)
    start = f"train.init_from={folder / 'student.safetensors'}"
    outcome = kdad("train", config, f"output={tmp_path / 'run'}", start)
    assert outcome.codes == [1]
    assert "student.safetensors is damaged" in outcome.text


def test_a_training_starts_from_a_checkpoint_and_goes_on_without_it(config, tmp_path):
    newest = max((config.parent / "plain/checkpoints").glob("step_*"))
    source = shutil.copytree(newest, tmp_path / newest.name)
    words = [f"output={tmp_path / 'from'}", f"train.init_from={source}", "optim.lr=1e-12"]
    succeeds("train", config, *words, "train.epochs=1")
    file = config.parent / "plain/export/student.safetensors"
    weights(config.parent / "plain")
    shutil.rmtree(source)
    succeeds("train", config, *words, "train.changed_config=accept", processes=2)
    weights(tmp_path / "from")
    before, after = load_file(file), load_file(tmp_path / "from/export/student.safetensors")
    parameter = "network.layer1.0.conv1.weight"
    assert abs(before[parameter] - after[parameter]).max() < 1e-9


def test_a_checkpoint_to_start_from_is_verified_and_must_be_of_this_student(config, tmp_path):
    source = max((config.parent / "plain/checkpoints").glob("step_*"))
    words = ["train", config, f"output={tmp_path / 'run'}"]
    outcome = kdad(*words, f"train.init_from={source}", "method.teacher.layers=[1]", processes=2)
    assert outcome.codes == [1, 1]
    assert "is not in this student" in outcome.text
    damaged = shutil.copytree(source, tmp_path / source.name)
    file = next(damaged.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    outcome = kdad(*words, f"train.init_from={damaged}")
    assert outcome.codes == [1]
    assert f"{file} is damaged" in outcome.text
    outcome = kdad(*words, f"train.init_from={config.parent / 'plain'}")
    assert outcome.codes == [1]
    assert "there is no checkpoint at" in outcome.text
    assert not (tmp_path / "run").exists()


def test_no_training_image_is_an_error_that_says_so(config, tmp_path):
    images = make_mvtec(tmp_path / "images", train=1)
    shutil.rmtree(images / "train")
    packed = kdad("pack", images.parent, tmp_path / "shards", "--layout", "mvtec")
    assert packed.codes == [1]
    assert "train" in packed.text


def test_a_single_training_image_is_enough(config, tmp_path):
    make_mvtec(tmp_path / "images", category="tile", train=1)
    succeeds("pack", tmp_path / "images", tmp_path / "shards", "--size", 32)
    run = trained(config, "single", f"data.shards={tmp_path / 'shards'}", processes=2)
    succeeds("score", run)
    threshold = json.loads((run / "metrics.json").read_text())["threshold"]
    assert threshold["value"] is None
    assert threshold["images"] == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_single_value_to_normalise_names_the_settings(config, processes):
    words = ["train.batch_size=1", "data.image_size=8", "method.teacher.layers=[1, 2, 3]"]
    run = config.parent / f"one{processes}"
    outcome = kdad("train", config, f"output={run}", *words, processes=processes)
    assert outcome.codes == [1] * processes, outcome.text
    assert "Traceback" not in outcome.text
    assert outcome.text.count("kdad: ") == 1
    for key in ("train.batch_size", "data.image_size"):
        assert key in outcome.text


def test_compiled_networks_train_to_the_same_losses(config):
    try:
        check_compiler()
    except UsageError as error:
        require_or_skip("compiler", error.problem)
    compiled = records(
        trained(config, "compiled", "train.compile=true", "train.epochs=null", "train.steps=1")
    )
    assert compiled == pytest.approx(records(config.parent / "plain")[: len(compiled)], abs=1e-4)


def test_a_changed_configuration_goes_on_when_told_to(config):
    run = shutil.copytree(config.parent / "plain", config.parent / "longer")
    words = ["train", config, f"output={run}", "train.epochs=3"]
    refused = kdad(*words)
    assert refused.codes == [2]
    assert "train.epochs: 2 in the run, 3 now" in refused.text
    succeeds(*words, "train.changed_config=accept")
    assert len(records(run)) == len(records(config.parent / "plain")) * 3 // 2


def test_a_run_directory_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    outcome = kdad("train", config, f"output={tmp_path / 'file'}")
    assert outcome.codes == [2]
    assert str(tmp_path / "file") in outcome.text
    assert "Traceback" not in outcome.text


def test_weights_that_lack_layers_are_refused_before_anything_is_made(config, tmp_path):
    outcome = kdad(
        "train", config, f"output={tmp_path / 'run'}", "method.teacher.weights=absent.pth"
    )
    assert outcome.codes == [1]
    assert "absent.pth" in outcome.text
