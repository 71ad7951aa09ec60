"""Distillation of transformers as trainer and scorer meet it, and what it refuses."""

import ast
import json
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants

from kdad_dist.config.load import load
from kdad_dist.errors import ConfigError, KdadError, WeightsError
from kdad_dist.runtime.activations import activations
from kdad_dist.runtime.flops import operations
from tests.methods import batch, gradients, make_hub_vit, make_vitkd, weights_hash
from tests.needs import REPOSITORY

ID = "nateraw/vit-base-patch16-224-cifar10"


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return make_hub_vit(tmp_path_factory.mktemp("vit"))


def test_a_hub_teacher_has_no_gradients_and_takes_empty_batches(hub: Path) -> None:
    method = make_vitkd(hub, weights="pretrained")
    assert all(g is not None and g.any() for g in gradients(method, method(batch(3))))
    assert all(p.grad is None for p in method.teacher.parameters())
    assert method(batch(0))["loss"].shape == (0,)
    assert method.eval().predict(batch(0).image).anomaly_map.shape == (0, 32, 32)
    assert method.targets(batch(3).image)[0].shape == (3, 32, 5, 1)
    assert operations(method, 32) > 0
    assert activations(method, 2, 32, "no") > 0


def test_a_hub_teacher_serves_several_threads_at_a_time(hub: Path) -> None:
    method = make_vitkd(hub, weights="pretrained").requires_grad_(False).eval()
    expected = method.predict(batch(3).image)
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(method.predict, [batch(3).image] * 16))
    assert all(torch.equal(p.anomaly_map, expected.anomaly_map) for p in said)
    assert all(torch.equal(p.pred_score, expected.pred_score) for p in said)


def test_a_random_hub_teacher_is_drawn_from_the_seed(hub: Path) -> None:
    assert weights_hash(make_vitkd(hub).teacher) == weights_hash(make_vitkd(hub).teacher)
    assert weights_hash(make_vitkd(hub).teacher) != weights_hash(
        make_vitkd(hub, weights="pretrained").teacher
    )


@pytest.mark.parametrize("wrapper", ["module", "encoder"])  # the latter of our classifiers
def test_a_file_of_timm_weights_is_the_teacher(wrapper: str, tmp_path: Path) -> None:
    first = make_vitkd()
    file = tmp_path / "weights.pth"
    torch.save({f"{wrapper}.{k}": v for k, v in first.teacher.network.state_dict().items()}, file)
    assert weights_hash(make_vitkd(weights=str(file)).teacher) == weights_hash(first.teacher)


def test_positions_of_a_file_are_interpolated_to_the_size_of_the_images(tmp_path: Path) -> None:
    network = make_vitkd(size=64).teacher.network
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    loaded = make_vitkd(weights=str(file)).teacher.network
    network.set_input_size(img_size=32)  # timm's own way
    torch.testing.assert_close(loaded.pos_embed, network.pos_embed)
    for wrong in (network.pos_embed[:, :4], network.pos_embed[..., :7]):
        torch.save({**network.state_dict(), "pos_embed": wrong}, file)
        with pytest.raises(WeightsError, match="pos_embed: shape"):
            make_vitkd(weights=str(file))


def test_images_are_normalised_as_asked(hub: Path) -> None:
    deviations = {
        how: make_vitkd(hub, weights="pretrained", normalize=how).teacher.std.flatten().tolist()
        for how in ("teacher", "imagenet", "none")
    }
    assert deviations["teacher"] == [0.25] * 3 and deviations["none"] == [1] * 3
    assert deviations["imagenet"] == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "64 wide"),
        ({"layers": (2, 13)}, "has the layers 1 to 6"),
        ({"layers": (4, 2)}, "from shallow to deep"),
        ({"backbone": "resnet18"}, "not a vision transformer"),
        ({"backbone": "vit_base_patch61_224"}, "did you mean"),
        ({"size": 40}, "choose a multiple of 16"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_vitkd(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["/abs/hfvit", "../hfvit", "no/such/folder", "a/b/", "~/hfvit"])
def test_a_folder_that_is_not_there_is_no_id_of_the_hub(name: str) -> None:
    said = f"there is no folder {re.escape(name)} .*check method.teacher.backbone"
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        make_vitkd(name)


def test_a_single_word_may_be_a_folder_or_a_name_and_is_neither() -> None:
    with pytest.raises(ConfigError, match="timm has no 'hfvitt', and there is no such folder"):
        make_vitkd("hfvitt")


def test_a_hub_teacher_that_does_not_fit_is_refused_with_what_does(
    hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="set data.image_size=32"):
        make_vitkd(hub, size=64)
    with pytest.raises(ConfigError, match="has the layers 1 to 4"):
        make_vitkd(hub, layers=(2, 5))
    settings = json.loads((hub / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_channels": 1}))
    with pytest.raises(ConfigError, match="of 1 channel; ours have three"):
        make_vitkd(tmp_path)
    with pytest.raises(ConfigError, match="with weights of its own"):
        make_vitkd(hub, weights="weights.pth")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "Swin",
            {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
            "8 x 8 patches",
        ),
        ("ViTMAE", {"hidden_size": 8, "num_hidden_layers": 2}, "hides patches"),
    ],
)
def test_a_hub_network_that_keeps_no_token_per_patch_is_refused(
    tmp_path: Path, kind: str, options: dict[str, object], said: str
) -> None:
    import transformers

    settings = getattr(transformers, f"{kind}Config")(image_size=32, patch_size=4, **options)
    settings.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        make_vitkd(tmp_path, layers=(1, 2))


def lose(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def other_layers(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 5}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose("config.json"), "no network that transformers knows"),
        (lose("model.safetensors"), "cannot be read"),
        (lose("preprocessor_config.json"), "mean and deviation"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), "mean and deviation"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "no network that transformers knows"),
        (other_layers, "lack 16 tensors"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(hub, tmp_path, damage, said) -> None:
    folder = shutil.copytree(hub, tmp_path / "vit")
    damage(folder)
    with pytest.raises(WeightsError, match=said) as found:
        make_vitkd(folder, weights="pretrained")
    assert str(folder) in str(found.value)


def test_a_hub_id_without_a_network_asks_nobody_and_names_the_folder(monkeypatch) -> None:
    lookup = Mock(side_effect=OSError("there is no network"))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=f"(?s)no folder {ID}.*method.teacher.backbone=FOLDER"):
        make_vitkd(ID, layers=(3, 6), size=224, weights="pretrained")
    lookup.assert_not_called()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.score_layers=[1]", "score_layers must be of teacher.layers"),
        ("method.teacher.layers=[0,3]", "greater than or equal to 1"),
        ("method.student.dropout=1", "dropout"),
        ("method.normalize=clip", "normalize"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, said: str) -> None:
    with pytest.raises(KdadError, match=said):
        load("vitkd_cifar10", [override])


def test_transformers_is_imported_only_where_it_is_needed() -> None:
    """Its import takes seconds, and no other method needs it."""
    source = (REPOSITORY / "kdad_dist/models/hf.py").read_text()
    at_once = [node for node in ast.parse(source).body if "transformers" in ast.unparse(node)]
    assert not [n for n in at_once if isinstance(n, ast.Import | ast.ImportFrom)]
