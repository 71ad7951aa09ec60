"""Backbones and their weights, with real networks and real files."""

import pickle
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from kdad_dist.config.classkd import ClassifierConfig
from kdad_dist.config.methods import TeacherConfig
from kdad_dist.errors import ConfigError, WeightsError
from kdad_dist.methods import no_runs
from kdad_dist.models import weights as weights_module
from kdad_dist.models.backbone import (
    FeatureNet,
    build_backbone,
    build_student,
    build_teacher,
    layer_of,
)
from kdad_dist.models.backbone_classifier import build_classifier
from kdad_dist.models.weights import load_weights, read_weights
from tests.launcher import connections, ends
from tests.methods import weights_hash

SMALL = "test_resnet"
LAYERS = [1, 2, 3]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small(role: str = "teacher", seed: int = 0) -> FeatureNet:
    return build_backbone(SMALL, "random", LAYERS, seed, role)


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.contiguous() for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("test_resnet", [(16, 16), (8, 8)]),
        ("vgg11_bn", [(32, 32), (16, 16)]),
        ("test_vit", [(4, 4), (4, 4)]),
        ("test_efficientnet", [(16, 16), (8, 8)]),
        ("test_convnext", [(8, 8), (4, 4)]),
        ("swin_tiny_patch4_window7_224", [(8, 8), (4, 4)]),
    ],
)
def test_any_family_gives_maps_and_has_no_parameter_without_gradient(
    name: str, shapes: list[tuple[int, int]]
) -> None:
    net = build_backbone(name, "random", [1, 2], 0, "student")
    maps = net(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape[-2:]) for m in maps] == shapes
    sum(m.square().mean() for m in maps).backward()
    unused = [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_a_network_is_built_alike_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        quiet = build_backbone("test_convnext", "random", [1, 2], 0, "student")
    net = build_backbone("test_convnext", "random", [1, 2], 0, "student")
    trained = [[p.requires_grad for p in each.parameters()] for each in (quiet, net)]
    assert trained[0] == trained[1] and any(trained[0])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_an_empty_batch_gives_empty_maps_and_zero_gradients(name: str) -> None:
    net = build_backbone(name, "random", [0, 1], 0, "student")
    maps = net(torch.rand(0, 3, 64, 64))
    full = net(torch.rand(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps] == [m.shape[1:] for m in full]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_the_maps_of_a_resnet18_have_the_papers_shapes_and_nothing_lies_deeper() -> None:
    net = build_backbone("resnet18", "random", [1, 2, 3], 0)
    shapes = [tuple(m.shape[1:]) for m in net(torch.rand(1, 3, 256, 256))]
    assert shapes == [(64, 64, 64), (128, 32, 32), (256, 16, 16)]
    assert not any("layer4" in key or "fc" in key for key in net.state_dict())


def test_random_weights_follow_seed_and_role_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = small(), small(), small(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_hash(first) == weights_hash(again)
    assert len({weights_hash(net) for net in (first, other, small("student"))}) == 3


def test_the_hash_is_of_values_and_not_of_memory_format() -> None:
    net = small()
    before = weights_hash(net)
    assert weights_hash(net.to(memory_format=torch.contiguous_format)) == before
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-6
    assert weights_hash(net) != before


def test_a_teacher_is_frozen_and_in_eval_mode() -> None:
    teacher = build_teacher(TeacherConfig(SMALL, "random"), 0)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(
        p.requires_grad for p in build_student(TeacherConfig(SMALL, "random"), 0).parameters()
    )


def test_normalisation_is_the_one_of_the_pretrained_weights_and_is_not_saved() -> None:
    resnet = build_backbone("resnet18", "random", [1], 0)
    assert resnet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    vit = build_backbone("vit_tiny_patch16_224", "random", [0], 0)
    assert vit.std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert not {"mean", "std"} & set(small().state_dict())


def test_an_unknown_backbone_is_named_with_near_misses() -> None:
    with pytest.raises(ConfigError, match=r"'resnet_18'[\s\S]*did you mean .*resnet18"):
        build_backbone("resnet_18", "random", [1], 0)


@pytest.mark.parametrize("name", ["", "../hfvit", "here", "here/w.pth"])
def test_a_folder_or_file_in_place_of_a_name_is_told_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    said = rf"timm has no '{re.escape(name)}'"
    if name:
        said += r"[\s\S]*a folder .* for vitkd, and a file of weights for method.teacher.weights"
    with pytest.raises(ConfigError, match=said):
        build_backbone(name, "random", [1], 0)


def test_an_unknown_tag_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"no weights 'tv_in2k' of resnet18[\s\S]*tv_in1k"):
        build_backbone("resnet18.tv_in2k", "random", [1], 0)


@pytest.mark.parametrize(
    ("name", "exists"), [("resnet18", r"4 \(layer4\)"), ("test_vit", "blocks.5")]
)
def test_a_layer_out_of_range_is_answered_with_those_that_exist(name: str, exists: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[1, 70\], but {name} has the layers .*{exists}"):
        build_backbone(name, "random", [1, 70], 0)


@pytest.mark.parametrize("layers", [[2, 1], [1, 1]])
def test_layers_out_of_order_or_twice_are_refused(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match="shallow to deep"):
        build_backbone(SMALL, "random", layers, 0)


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone.", "network."])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_whole_classifier_file_loads_under_wrappers_prefixes(
    tmp_path: Path, prefix: str, kind: str
) -> None:
    import timm

    source = timm.create_model(SMALL, pretrained=False)
    tensors = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    file = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save({"epoch": 3, "state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    net = build_backbone(SMALL, str(file), LAYERS, 0)
    own = net.network.state_dict()
    assert all(torch.equal(own[key], source.state_dict()[key]) for key in own)


def test_flattened_names_of_a_feature_extractor_meet_those_of_a_classifier(tmp_path: Path) -> None:
    import timm

    source = timm.create_model("vgg11_bn", pretrained=False).features
    save_file(
        {f"features.{k}": v for k, v in source.state_dict().items()}, tmp_path / "v.safetensors"
    )
    net = build_backbone("vgg11_bn", str(tmp_path / "v.safetensors"), [1], 0)
    assert torch.equal(net.network.state_dict()["features_0.weight"], source[0].weight)


def test_missing_layers_and_other_shapes_are_all_listed(tmp_path: Path) -> None:
    tensors = state(small().network)
    del tensors["layer1.0.conv1.weight"]
    tensors["conv1.0.weight"] = torch.zeros(1, 2, 3)
    tensors["bn1.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        build_backbone(SMALL, str(tmp_path / "w.safetensors"), LAYERS, 0)
    message = str(caught.value)
    assert "w.safetensors does not fit the backbone: 3 of its" in message
    assert "layer1.0.conv1.weight: missing" in message
    assert "conv1.0.weight: shape (1, 2, 3), needed (" in message
    assert "bn1.bias: holds NaN" in message
    assert "or only layers that they hold (method.teacher.backbone, method.teacher.l" in message
    classifier = ClassifierConfig(SMALL, str(tmp_path / "w.safetensors"))
    with pytest.raises(WeightsError) as caught:
        build_classifier(classifier, 3, 32, 0, no_runs)
    assert caught.value.remedy.endswith("weights were made for (method.network.backbone)")


def test_weights_that_lack_whole_layers_are_told_by_layer(tmp_path: Path) -> None:
    file = str(tmp_path / "w.safetensors")
    save_file(state(build_backbone(SMALL, "random", [1, 2], 0).network), file)
    with pytest.raises(WeightsError, match=r"does not hold layers 3 and 4 of the backbone") as said:
        build_backbone(SMALL, file, [1, 2, 3, 4], 0)
    assert "method.teacher.layers" in said.value.remedy and "\n" not in said.value.problem
    with pytest.raises(WeightsError, match=r"does not hold layer 3 of"):
        build_backbone(SMALL, file, [2, 3], 0)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("vgg11", ["features_0", "features_3"], ["features_6", "features_8"]), ("test_vit", [], [])],
)
def test_the_tensors_of_a_layer_are_those_up_to_its_end(
    name: str, first: list[str], last: list[str]
) -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, features_only=True, out_indices=(1, 2))
    tensors = [f"{module}.{kind}" for module in first + last for kind in ("weight", "bias")]
    assert layer_of(network) == dict(zip(tensors, [1] * 4 + [2] * 4, strict=False))


def test_weights_of_which_nothing_fits_are_said_to_be_of_another_network(tmp_path: Path) -> None:
    file = str(tmp_path / "w.safetensors")
    save_file({"features.0.weight": torch.zeros(4, 3, 3, 3)}, file)
    with pytest.raises(WeightsError, match=r"is of another network than the backbone: \d+ of its"):
        build_backbone(SMALL, file, [1, 2], 0)


def test_a_network_that_lacks_weights_keeps_its_own_when_loading_fails() -> None:
    net = small()
    before = weights_hash(net)
    tensors = {k: v + 1 for k, v in state(net.network).items() if "layer3" not in k}
    with pytest.raises(WeightsError):
        load_weights(net, tensors, "a file")
    assert weights_hash(net) == before


def test_a_file_with_two_networks_is_refused_unless_they_are_equal() -> None:
    net = small()
    one = {f"student.{key}": value for key, value in state(net.network).items()}
    other = {f"teacher.backbone.{key}": value for key, value in state(net.network).items()}
    load_weights(net, one | other, "a file")
    other = {key: value + 1 for key, value in other.items()}
    said = r"a file holds more than one network[\s\S]*student\.\S+ and teacher\.backbone\."
    with pytest.raises(WeightsError, match=said):
        load_weights(net, one | other, "a file")
    load_weights(net, one | {"teacher.head.1": torch.zeros(1), "head.1": torch.ones(1)}, "a file")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Bomb()}, "bomb.pth")
    Path("bare.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pth", "bare.pth"):
        with pytest.raises(WeightsError, match=rf"{name}[\s\S]*convert it to .safetensors"):
            read_weights(Path(name))
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{"),
        ("empty.safetensors", b""),
        ("empty.pth", b""),
        ("text.pth", b"hello"),
        ("weights.bin", b"hello"),
    ],
)
def test_a_damaged_or_unknown_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_weights(tmp_path / name)


def test_a_missing_file_or_one_without_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights file"):
        read_weights(tmp_path / "none.safetensors")
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").touch()
    said = rf"{run} is the directory of a run; method.weights takes a file[\s\S]*"
    said += rf"method.weights={run}/export/student.safetensors, which `kdad export '{run}'` writes"
    with pytest.raises(WeightsError, match=said):
        read_weights(run, "method.weights")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_weights(tmp_path / "list.pth")


def test_an_unreachable_hub_is_not_asked_by_its_client_and_the_error_names_the_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    client = Mock(side_effect=OSError("it would try again for 46 s"))
    monkeypatch.setattr(weights_module.huggingface_hub, "hf_hub_download", client)
    says = r"127.0.0.1:9 (cannot be reached|did not answer)[\s\S]*"
    says += r"/resolve/main/\S+[\s\S]*FILE.safetensors"
    with pytest.raises(WeightsError, match=says):
        build_backbone("resnet18.tv_in1k", "pretrained", LAYERS, 0)
    # Random weights that would be frozen are refused, so that is not what to try.
    for freeze, more in (("none", ""), ("all_but_bn", " method.network.freeze=none")):
        classifier = ClassifierConfig("resnet18.tv_in1k", freeze=freeze)
        with pytest.raises(WeightsError) as caught:
            build_classifier(classifier, 3, 32, 0, no_runs)
        assert caught.value.remedy.endswith(f'method.network.weights="random"{more}')
    client.assert_not_called()


def test_a_hub_that_never_answers_is_given_up_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(weights_module, "HUB_PATIENCE", 0.5)
        with pytest.raises(WeightsError, match=r"did not answer within 0.5 s|cannot be reached"):
            ends(lambda: build_backbone("resnet18.tv_in1k", "pretrained", LAYERS, 0))
        assert connections(silent) <= 1  # it gave up before the request was made, or after it


def test_pretrained_weights_in_the_hubs_cache_are_used_without_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    source = timm.create_model(SMALL, pretrained=False)
    repository = timm.get_pretrained_cfg(SMALL).hf_hub_id
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    save_file(source.state_dict(), folder / "snapshots/abc/model.safetensors")
    net = build_backbone(SMALL, "pretrained", LAYERS, 0)
    assert torch.equal(net.network.state_dict()["bn1.weight"], source.state_dict()["bn1.weight"])
    assert torch.equal(
        net.network.state_dict()["layer2.0.conv1.weight"],
        source.state_dict()["layer2.0.conv1.weight"],
    )


def test_the_shared_imagenet_weights_load_strictly(shared_data: Path) -> None:
    file = shared_data / "weights/resnet18_imagenet_layer1-3.safetensors"
    net = build_backbone("resnet18.tv_in1k", str(file), LAYERS, 0)
    assert net.network.state_dict().keys() == read_weights(file).keys()
    with pytest.raises(WeightsError, match=r"layer4.0.conv1.weight: missing"):
        build_backbone("resnet18.tv_in1k", str(file), [1, 4], 0)


def test_a_hub_that_answers_but_has_no_such_file_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NothingHere(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), NothingHere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{revision}/{filename}"
        )
        with pytest.raises(WeightsError, match=r"refused it: [\s\S]*FILE.safetensors"):
            build_backbone("resnet18.tv_in1k", "pretrained", LAYERS, 0)
        server.shutdown()
