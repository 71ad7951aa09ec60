"""Exported detectors say what the run says, in programs that know nothing of us, or not at all."""

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from kdad_dist import Detector, load
from kdad_dist.config.load import load as configured
from kdad_dist.config.load import load_run
from kdad_dist.data.reader import Fit
from kdad_dist.detector import Threshold
from kdad_dist.errors import DataError, ExportError, UsageError
from kdad_dist.export import onnx as export_onnx
from kdad_dist.export import parity as export_parity
from kdad_dist.export import pt2 as export_torch
from kdad_dist.export import weights as export_weights
from kdad_dist.export.graph import traced
from kdad_dist.export.write import export
from kdad_dist.methods import build_method
from kdad_dist.methods.readout import Readout
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.models.lora import merged_tensors
from kdad_dist.runtime.restore import Trained
from tests.helpers import texture
from tests.kdad import kdad, succeeds
from tests.needs import REPOSITORY

pytestmark = pytest.mark.launch
SQUARES = np.stack([texture(i, 32, 32) for i in range(5)])


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both kinds of graph; nobody writes to it."""
    run = shutil.copytree(runs / "stfpm", tmp_path_factory.mktemp("exported") / "run")
    for kind in ("onnx", "torch"):
        export(load_run(run), kind)
    return run


@pytest.fixture
def run(request: pytest.FixtureRequest, runs: Path, tmp_path: Path) -> Path:
    """A run of our own, without exports."""
    return shutil.copytree(runs / getattr(request, "param", "stfpm"), tmp_path / "run")


def manifest(run: Path) -> dict:
    return json.loads((run / "export/manifest.json").read_text())


def change(file: Path, **values: object) -> None:
    """Other values of `data` in a run's configuration, or of the facts of its data."""
    content = yaml.safe_load(file.read_text())
    (content.get("data", content)).update(values)
    file.write_text(json.dumps(content))  # which YAML is too


def assert_close(found: np.ndarray, expected: np.ndarray | None) -> None:
    assert expected is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.max())


def assert_both_say_what_the_run_says(run: Path) -> None:
    detector = load(run, device="cpu")
    session = onnxruntime.InferenceSession(run / "export/detector.onnx")
    program = torch.export.load(run / "export/detector.pt2").module()
    names = [output.name for output in session.get_outputs()]
    for images in (SQUARES, SQUARES[:1], SQUARES[:2]):
        ours = detector.predict(images)
        theirs = dict(zip(names, session.run(None, {"image": images}), strict=True))
        same = {name: values.numpy() for name, values in program(torch.from_numpy(images)).items()}
        for said in (theirs, same):
            assert_close(said["pred_score"], ours.pred_score)
            for name in ("anomaly_map", "reconstruction"):
                assert (name in said) == (getattr(ours, name) is not None)
            if ours.anomaly_map is not None:
                assert_close(said["anomaly_map"], ours.anomaly_map)
            if ours.reconstruction is not None:
                levels = said["reconstruction"].astype(int) - ours.reconstruction
                assert said["reconstruction"].dtype == np.uint8 and abs(levels).max() <= 1
    measured = json.loads((run / "metrics.json").read_text())["mean"]
    for entry in manifest(run).values():
        parity = entry["parity"]
        assert parity["images"] == parity["test_images"] == 7 and parity["generated"] is None
        assert 0 <= parity["pred_score"]["largest_difference"] < 1e-4
        assert parity["image_auroc"]["run"] == pytest.approx(measured["image_auroc"], abs=0.1)
        assert parity["pixel_auroc"]["run"] == pytest.approx(measured["pixel_auroc"], abs=1e-4)
    assert {"detector.onnx", "detector.pt2"} == manifest(run).keys()


def test_every_format_says_what_the_run_says_of_batches_of_any_size(exported):
    assert_both_say_what_the_run_says(exported)


@pytest.mark.parametrize(
    "image", [SQUARES / np.float32(255), SQUARES.transpose(0, 3, 1, 2), SQUARES[..., :1]]
)
def test_an_image_of_another_form_is_refused_by_both(exported, image):
    session = onnxruntime.InferenceSession(exported / "export/detector.onnx")
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        session.run(None, {"image": image})
    program = torch.export.load(exported / "export/detector.pt2").module()
    with pytest.raises(RuntimeError, match=r"dtype mismatch|to be equal to"):
        program(torch.from_numpy(image))


@pytest.mark.parametrize("run", ["loramae", "mkd", "vitkd"], indirect=True)
def test_every_method_can_be_exported(run):
    for kind in ("onnx", "torch"):
        export(load_run(run), kind)
    assert_both_say_what_the_run_says(run)


def test_a_file_carries_what_is_needed_to_decide_and_nothing_of_this_machine(exported):
    limits = json.loads((exported / "metrics.json").read_text())["threshold"]
    file, packed = exported / "export/detector.onnx", {"facts.json": ""}
    torch.export.load(exported / "export/detector.pt2", extra_files=packed)
    told = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert told == json.loads(packed["facts.json"]) == manifest(exported)[file.name]["facts"]
    assert float(told["threshold"]) == limits["value"]
    assert float(told["pixel_threshold"]) == limits["pixel_value"]
    assert (told["image_size"], told["resize"], told["method"]) == ("32", "squash", "stfpm")
    for name in manifest(exported):
        content = (exported / "export" / name).read_bytes()
        for path in (REPOSITORY, sys.prefix, exported):
            assert str(path).encode() not in content


def test_the_same_weights_give_the_same_bytes(run, exported):
    for kind in ("onnx", "torch"):
        export(load_run(run), kind)
    for name in manifest(exported):
        one, other = ((of / "export" / name).read_bytes() for of in (run, exported))
        assert one == other


def test_everything_between_pixels_and_score_is_in_the_graph(run):
    words = ["score.standardise=true", "score.opening=true", "score.reduce=quantile"]
    succeeds("score", run, *words)
    outcome = succeeds("export", run, *words, "--format", "onnx", "--compare", 4, "--json")
    entry = json.loads(outcome.text[outcome.text.index("{") :])
    assert entry["parity"]["images"] == 4
    for said in (
        "4 of 7 test images",
        "anomaly_map: largest difference",
        "pixel_auroc: 0.",
        "(of 4 images)",
    ):
        assert said in outcome.text
    assert entry["facts"]["threshold"] in outcome.text
    ours = load(run, words, "cpu").predict(SQUARES)
    session = onnxruntime.InferenceSession(run / "export/detector.onnx")
    score, anomaly_map = session.run(None, {"image": SQUARES})
    assert_close(score, ours.pred_score)
    assert_close(anomaly_map, ours.anomaly_map)


def test_the_window_and_the_tiles_of_any_number_of_images_are_in_the_graph(runs, monkeypatch):
    words = ["data.image_size=27", "data.centre_margin=5", "data.tile=20", "data.tile_overlap=8"]
    config = configured(runs / "stfpm.yaml", words)
    method = build_method(config)
    readout = Readout(method, config.score, config.data.tiling)
    cpu, fit = torch.device("cpu"), Fit(27, None, "squash", 5)
    detector = Detector(config, Trained(method, 0, ""), readout, fit, cpu, Threshold())
    for kind in (export_onnx, export_torch):
        said = kind.runner(kind.encode(traced(detector), {}))(SQUARES)
        assert_close(said["anomaly_map"], detector.predict(SQUARES).anomaly_map)
    monkeypatch.setattr(export_onnx, "LARGEST", 10**6)
    with pytest.raises(ExportError, match=r"the weights take .*\n.*--format torch"):
        export_onnx.encode(traced(detector), {})


def resized_otherwise(file: Path, facts: dict, copy: Path) -> Path:
    """The same graph with other facts inside."""
    if file.suffix == ".onnx":
        graph = onnx.load(file)
        onnx.helper.set_model_props(graph, facts)
        onnx.save(graph, copy)
    else:
        program = torch.export.load(file)
        torch.export.save(program, copy, extra_files={"facts.json": json.dumps(facts)})
    return copy


@pytest.mark.parametrize(
    ("example", "name", "resize"),
    [
        ("judge.py", "detector.onnx", "squash"),
        ("judge.py", "detector.onnx", "shorter"),
        ("judge_pt2.py", "detector.pt2", "shorter"),
    ],
)
def test_an_example_needs_none_of_us_and_says_what_the_run_says(
    run, runs, exported, example, name, resize
):
    file, paths = exported / "export" / name, sorted((runs / "new").iterdir())
    if resize == "shorter":
        change(run / "data.json", resize=resize)
        facts = manifest(exported)[name]["facts"] | {"resize": resize}
        file = resized_otherwise(file, facts, run / name)
    detector = load(run, device="cpu")
    absent = ["onnxruntime" if file.suffix == ".pt2" else "torch", "kdad_dist", "onnx", "scipy"]
    code = (
        "import runpy, sys\n"
        f"sys.modules |= dict.fromkeys({absent})  # not importable\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [REPOSITORY / "examples" / example, file, *paths]
    command = [sys.executable, "-I", "-c", code, *map(str, words)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    for line, path in zip(outcome.stdout.splitlines(), paths, strict=True):
        name, score, verdict = line.rsplit(" ", 2)
        expected = detector.predict(path)
        assert name == str(path)
        assert float(score) == pytest.approx(expected.pred_score[0], rel=1e-4)
        assert (verdict == "anomalous") == expected.pred_label[0]


def test_without_its_test_images_a_file_is_compared_on_noise_and_says_so(run):
    change(run / "config.yaml", shards="gone")
    parity = export(load_run(run), "torch")["parity"]
    assert "gone" in parity["generated"] and parity["images"] == 16
    assert parity["anomaly_map"]["largest_value"] > 0
    assert parity["image_auroc"] == {"run": None, "exported": None}


def test_a_file_that_says_something_else_is_not_written(run, exported, monkeypatch):
    told = export_parity.judge

    def otherwise(*words):
        said = told(*words)
        said.anomaly_map[0, 0, 0] += 1e-3 * said.anomaly_map.max()
        return said

    monkeypatch.setattr(export_parity, "judge", otherwise)
    with pytest.raises(ExportError, match="anomaly_map of the exported file differs"):
        export(load_run(run), "torch")
    assert not (run / "export").exists()
    before = {path: path.stat().st_mtime_ns for path in (exported / "export").iterdir()}
    with pytest.raises(ExportError):
        export(load_run(exported), "torch")
    assert {path: path.stat().st_mtime_ns for path in (exported / "export").iterdir()} == before


def lora_twice(tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = 2 * tensor - before[name]


def lora_forgotten(tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    tensors |= {name: before[name] for name in tensors}


def one_bit(tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    [name] = [name for name in tensors if name.endswith("norm.bias")][-1:]
    tensors[name] = tensors[name].nextafter(torch.tensor(9.0))


def left_out(tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    tensors.popitem()


@pytest.mark.parametrize("run", ["loramae"], indirect=True)
def test_weights_that_are_not_the_runs_are_refused(run, monkeypatch):
    entry = export(load_run(run), "safetensors")
    parity = entry["parity"]
    assert (parity["images"], parity["test_images"]) == (4, 7)
    assert entry["tensors"] - entry["tensors_of_checkpoint"] == 16  # two in each of eight blocks
    shutil.rmtree(run / "export")
    for wrong, said in (
        (lora_twice, "of the exported file differs from the run's"),
        (lora_forgotten, "of the exported file differs from the run's"),
        (one_bit, "1 tensor of the export not as in .*\n.*norm.bias"),
        (left_out, "1 tensor of the export not as in "),
    ):

        def merged(network, wrong=wrong):
            tensors = merged_tensors(network)
            wrong(tensors, network.state_dict())
            return tensors

        monkeypatch.setattr(export_weights, "merged_tensors", merged)
        with pytest.raises(ExportError, match=said):
            export(load_run(run), "safetensors")
        assert not (run / "export").exists()


@pytest.mark.parametrize("run", ["mkd"], indirect=True)
def test_what_has_no_graph_is_refused_with_a_way_out(run, monkeypatch):
    outcome = kdad("export", run, "method.localise=gradient", "--format", "onnx")
    assert outcome.codes == [2]
    assert "add method.localise=none" in outcome.text
    for word in ("method.localise=smoothgrad", "method.localise=guided", "score.precision=bf16"):
        with pytest.raises(UsageError, match="add (method|score)"):
            export(load_run(run, [word]), "torch")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs onnxscript.*\n.*kdad_dist\[export\]"):
        export(load_run(run), "onnx")
    assert not (run / "export").exists()


def test_a_network_that_torch_cannot_follow_is_refused(run, monkeypatch):
    real = Stfpm.predict

    def deciding(self, image):
        return real(self, image if image.sum() > 1 else -image)

    monkeypatch.setattr(Stfpm, "predict", deciding)
    with pytest.raises(ExportError, match="cannot be written as a graph"):
        export(load_run(run), "torch")
    assert not (run / "export").exists()


def test_a_damaged_test_image_is_named(run, runs, tmp_path):
    shards = shutil.copytree(runs / "shards", tmp_path / "shards")
    for shard in shards.glob("*test*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    change(run / "config.yaml", shards=str(shards))
    with pytest.raises(DataError, match="do not match the index"):
        export(load_run(run), "torch")
    assert not (run / "export").exists()


def test_the_notebook_runs_on_a_run_and_stores_nothing(runs, tmp_path, monkeypatch):
    notebook = nbformat.read(REPOSITORY / "examples/detector.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(runs / "stfpm")
    (tmp_path / "new").symlink_to(runs / "new")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    ).execute()
    told = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    [said] = [output["text"] for output in told if output.get("name") == "stdout"]
    names = sorted(path.name for path in (runs / "new").iterdir())
    assert [line.split(":")[0] for line in said.splitlines()] == names
    *_, picture, scores = [output["data"] for output in told if "data" in output]
    shown = Image.open(io.BytesIO(base64.b64decode(picture["image/png"])))
    assert shown.size == (64, 32)
    detector = load(runs / "stfpm", device="cpu")
    expected = [detector.predict(path).pred_score[0] for path in sorted((runs / "new").iterdir())]
    np.testing.assert_allclose(json.loads(scores["text/plain"]), expected, rtol=1e-4)
