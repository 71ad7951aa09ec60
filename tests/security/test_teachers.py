"""Networks in the hub's form that bring code with them."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdad_dist.errors import WeightsError
from tests.methods import make_vitkd, weights_hash
from tests.security.test_files import trap  # noqa: F401 - a fixture
from tests.unit.test_vitkd import hub  # noqa: F401

CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel
Path({trap!r}).mkdir()
class Config(PretrainedConfig):
    model_type = "evil"
class Model(PreTrainedModel):
    config_class = Config
"""
AUTO = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}


@pytest.fixture
def folder(hub: Path, tmp_path: Path, monkeypatch) -> Path:  # noqa: F811
    """A copy with code beside the weights, and a user who says yes to everything."""
    copy = shutil.copytree(hub, tmp_path / "vit")
    (copy / "evil.py").write_text(CODE.format(trap=str(tmp_path / "it_ran")))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return copy


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_code_of_a_network_is_neither_run_nor_asked_about(
    folder: Path, tmp_path: Path, weights: str
):
    change(folder, model_type="evil", auto_map=AUTO)
    with pytest.raises(WeightsError, match="no network that transformers knows"):
        make_vitkd(folder, weights=weights)
    assert not (tmp_path / "it_ran").exists()


def test_a_network_that_is_known_is_taken_without_its_code(
    folder: Path,
    hub: Path,  # noqa: F811
    tmp_path: Path,
):
    change(folder, auto_map=AUTO)
    known = make_vitkd(hub, weights="pretrained")
    assert weights_hash(make_vitkd(folder, weights="pretrained").teacher) == weights_hash(
        known.teacher
    )
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched(folder: Path, key: str):
    change(folder, **{key: "somebody/kernel"})
    with pytest.raises(WeightsError, match="asks for code of the hub, 'somebody/kernel'"):
        make_vitkd(folder, weights="pretrained")


@pytest.mark.filterwarnings("ignore")  # torch, on the version of the pickle
@pytest.mark.parametrize("spoil", [lambda f: (f / "model.safetensors").unlink(), lambda _: None])
def test_a_pickle_in_place_of_weights_is_not_run(
    folder: Path,
    trap: bytes,  # noqa: F811
    spoil: Callable[[Path], None],
):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / name).write_bytes(trap)
    spoil(folder)
    with pytest.raises(WeightsError, match="cannot be read"):
        make_vitkd(folder, weights="pretrained")
