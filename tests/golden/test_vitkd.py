"""Distillation of transformers against its equations, counts, and the libraries' own results."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdad_dist.config.methods import VitkdConfig, VitStudentConfig, VitTeacherConfig
from kdad_dist.draws import seeded
from kdad_dist.methods.vitkd import Vitkd
from kdad_dist.models.vit_student import Block
from kdad_dist.types import Batch
from tests.golden.test_mkd import plain_terms
from tests.methods import make_hub_vit

HEAD = 2 * 768 + 768 * 10 + 10
"""Parameters of the original's classifier: a LayerNorm and a linear layer."""


def make(backbone: str = "test_vit", size: int = 48, **options: object) -> Vitkd:
    torch.set_num_threads(1)
    teacher = VitTeacherConfig(backbone, "random", [2, 4, 6])
    options = {"student": VitStudentConfig(heads=4, mlp=32), **options}
    return Vitkd(VitkdConfig(teacher=teacher, **options), size, seed=0).eval()  # pyright: ignore[reportArgumentType]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def test_a_student_beside_a_vit_b_has_the_published_number_of_parameters() -> None:
    method = Vitkd(VitkdConfig(teacher=VitTeacherConfig(weights="random")), 224, seed=0)
    assert sum(p.numel() for p in method.student.parameters()) + HEAD == 13_364_490
    assert method.teacher.form == (768, 1, 16, 14)
    assert len(method.student.blocks) == 4


def test_a_block_is_torchs_attention_and_a_perceptron() -> None:
    block = Block(32, VitStudentConfig(heads=4, mlp=24, dropout=0.2)).eval()
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    attention.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.proj.weight,
            "out_proj.bias": block.proj.bias,
        }
    )
    x = torch.rand(2, 5, 32, generator=torch.Generator().manual_seed(1))
    normal = block.norm1(x)
    expected = x + attention(normal, normal, normal)[0]
    first, _, _, second, _ = block.mlp
    expected = expected + second(F.gelu(first(block.norm2(expected))))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit2"])
def test_tokens_of_a_timm_teacher_are_what_its_blocks_give(backbone: str, images: Tensor) -> None:
    method = make(backbone)
    with seeded(0, "teacher"):
        network = timm.create_model(backbone, img_size=48, num_classes=0).eval()
    seen = []
    for number in (1, 3, 5):
        network.blocks[number].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        network((images - method.teacher.mean) / method.teacher.std)
        for found, expected in zip(method.teacher(images), seen, strict=True):
            torch.testing.assert_close(found, expected)
            assert found.shape == (2, method.teacher.form.prefix + 9, 64)


def test_loss_and_score_are_the_plain_formulas(images: Tensor) -> None:
    method = make()
    losses = method(Batch(images, torch.arange(2), torch.arange(2)))
    score = method.predict(images).pred_score
    targets, features = method.teacher(images), method._student_tokens(images)
    for i in range(2):
        layers = [plain_terms(t[i], s[i]) for t, s in zip(targets, features, strict=True)]
        weighted = [0.01 * value + direction for value, direction in layers]
        assert losses["loss"][i].item() == pytest.approx(sum(weighted), rel=1e-5)
        assert score[i].item() == pytest.approx(sum(weighted[1:]), rel=1e-5)


def test_the_map_is_each_patchs_angle_enlarged(images: Tensor) -> None:
    method = make(score_layers=[4])
    target, feature = method.teacher(images)[1], method._student_tokens(images)[1]
    angles = torch.zeros(2, 3, 3)
    for i in range(2):
        for y in range(3):
            for x in range(3):
                t, s = (tokens[i, 1 + 3 * y + x].double() for tokens in (target, feature))
                angles[i, y, x] = 1 - (t @ s) / (t.norm() * s.norm())
    expected = F.interpolate(angles[:, None], (48, 48), mode="bilinear")[:, 0]
    torch.testing.assert_close(method.predict(images).anomaly_map, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_hub_vit(tmp_path_factory.mktemp("vit"), size=48, depth=6, classes=True)


def test_tokens_of_a_hub_teacher_are_its_hidden_states_before_the_last_norm(
    folder: Path, images: Tensor
) -> None:
    import transformers

    teacher = VitTeacherConfig(str(folder), "pretrained", [2, 4, 6])
    config = VitkdConfig(teacher=teacher, student=VitStudentConfig(heads=4, mlp=16))
    method = Vitkd(config, 48, seed=0).eval()
    assert method.teacher.form == (32, 1, 16, 3)
    network = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        said = network((images - 0.5) / 0.25, output_hidden_states=True)
        last = network.vit((images - 0.5) / 0.25).last_hidden_state
        found = method.teacher(images)
        for layer, tokens in zip((2, 4, 6), found, strict=True):
            torch.testing.assert_close(tokens, said.hidden_states[layer])
        torch.testing.assert_close(network.vit.layernorm(found[-1]), last)
    assert method.predict(images).anomaly_map.shape == (2, 48, 48)
