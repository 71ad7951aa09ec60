"""Classifier distillation: losses against plain loops, what is frozen, and what a teacher is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdad_dist.config.classkd import ClassifierConfig, ClasskdConfig, ClassTeacherConfig
from kdad_dist.methods.classkd import Classkd
from kdad_dist.methods.distill_losses import angle_relations, distance_relations, softened
from kdad_dist.models.backbone_classifier import KnownClassifier, assemble, build_head
from kdad_dist.models.dropout import RowDropout
from kdad_dist.models.gather import Rows, rows_of_all
from kdad_dist.types import Batch

CLASSES = ["cat", "dog", "ship"]
BACKBONE = "test_resnet"


def logits(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def alone(values: Tensor) -> Rows:
    return rows_of_all(values)


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def test_softened_probabilities_are_compared_by_their_divergence_times_the_squared_temperature():
    student, teacher, t = logits(), logits(seed=1), 1.5
    expected = []
    for s, z in zip((student / t).softmax(1), (teacher / t).softmax(1), strict=True):
        expected.append(t * t * sum(float(q) * math.log(q / p) for p, q in zip(s, z, strict=True)))
    found = softened(student, teacher, t)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    # Its mean is that over images, not over all numbers, which would be too small by the classes.
    logs, wanted = (student / t).log_softmax(1), (teacher / t).softmax(1)
    by_batch = t * t * F.kl_div(logs, wanted, reduction="batchmean")
    assert found.mean().item() == pytest.approx(by_batch.item(), rel=1e-5)


def test_relations_by_distance_are_those_of_a_loop_over_all_pairs():
    def relations(rows: Tensor) -> list[list[float]]:
        n = range(len(rows))
        far = [[(rows[i] - rows[j]).norm().item() for j in n] for i in n]
        positive = [d for line in far for d in line if d > 0]
        return [[d * len(positive) / sum(positive) for d in line] for line in far]

    student, teacher = logits(), logits(seed=1)
    s, t = relations(student), relations(teacher)
    pairs = [huber(s[i][j] - t[i][j]) for i in range(5) for j in range(5)]
    found = distance_relations(alone(student), alone(teacher))
    assert found.mean().item() == pytest.approx(sum(pairs) / 25, rel=1e-5)


def test_relations_by_angle_are_those_of_a_loop_over_all_triples():
    def cosine(rows: Tensor, i: int, j: int, k: int) -> float:
        if j in (i, k):
            return 0.0
        return F.cosine_similarity(rows[i] - rows[j], rows[k] - rows[j], dim=0).item()

    student, teacher, n = logits(), logits(seed=1), range(5)
    triples = [
        huber(cosine(student, i, j, k) - cosine(teacher, i, j, k)) for i in n for j in n for k in n
    ]
    found = angle_relations(alone(student), alone(teacher))
    assert found.mean().item() == pytest.approx(sum(triples) / 125, rel=1e-5)


@pytest.mark.parametrize("relations", [distance_relations, angle_relations])
def test_relations_know_neither_scale_nor_place_nor_rotation(relations):
    teacher = logits()
    turn, _ = torch.linalg.qr(logits(4, seed=2))
    moved = 3 * teacher @ turn + 7
    assert relations(alone(moved), alone(teacher)).abs().max() < 1e-6
    assert relations(alone(logits(seed=1)), alone(teacher)).min() > 1e-3


@pytest.mark.parametrize("relations", [distance_relations, angle_relations])
def test_relations_are_the_same_bits_where_networks_compute_in_bf16(relations):
    def computed(autocast: bool) -> tuple[Tensor, Tensor]:
        student = (logits() + 0.01 * logits(seed=1)).requires_grad_()  # almost the teacher's
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = relations(alone(student), alone(logits()))
        return loss, *torch.autograd.grad(loss.sum(), student)

    for found, expected in zip(computed(True), computed(False), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("relations", [distance_relations, angle_relations])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_one_image_and_equal_images_give_finite_gradients(relations, rows):
    student = torch.ones(rows, 3, requires_grad=True)
    loss = relations(alone(student), alone(logits(rows)[:, :3]))
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_the_heads_are_those_of_the_original():
    count = [sum(p.numel() for p in build_head(h, 512, 10).parameters()) for h in HEADS]
    assert count == [512 * 10 + 10, 512 * 1000 + 1000 + 2 * 1000 + 1000 * 10 + 10]
    kinds = [type(layer) for layer in build_head("original", 512, 10)]  # pyright: ignore
    assert kinds == [nn.Linear, RowDropout, nn.BatchNorm1d, nn.ReLU, nn.Linear]


HEADS = ("linear", "original")


def teacher_run(_) -> KnownClassifier:
    """What a run directory would give."""
    torch.manual_seed(7)
    network = assemble(BACKBONE, "original", len(CLASSES), 32)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return KnownClassifier("a run", BACKBONE, "original", CLASSES, network.state_dict())


def method(tmp_path, freeze="none", distill="none", **more) -> Classkd:
    encoder = assemble(BACKBONE, "linear", 2, 32).encoder
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    network = ClassifierConfig(BACKBONE, str(tmp_path / "encoder.pth"), "original", freeze)
    teacher = None if distill == "none" else ClassTeacherConfig(str(tmp_path))
    config = ClasskdConfig("classkd", network, teacher, distill, **more)
    return Classkd(config, CLASSES, 32, seed=0, open_run=teacher_run)


def batch(images: int = 4, seed: int = 0) -> Batch:
    image = torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    row = torch.arange(images)
    return Batch(image, row, row, label=row % len(CLASSES))


@pytest.mark.parametrize(
    ("freeze", "moving"),
    [
        ("none", {"convolution", "norm", "statistics", "head"}),
        ("all", {"head"}),
        ("all_but_bn", {"norm", "statistics", "head"}),
    ],
)
def test_freezing_leaves_what_it_says(tmp_path, freeze, moving):
    made = method(tmp_path, freeze).train()
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)  # moves all that has a gradient
    made(batch())["loss"].sum().backward()
    optimizer.step()
    norms = {n for n, m in made.student.encoder.named_modules() if isinstance(m, _BatchNorm)}  # pyright: ignore

    def kind(name: str) -> str:
        module, _, value = name.removeprefix("encoder.").rpartition(".")
        if name.startswith("head."):
            return "head"
        if module not in norms:
            return "convolution"
        return "norm" if value in ("weight", "bias") else "statistics"

    after = made.student.state_dict()
    moved = {kind(name) for name in after if not torch.equal(after[name], before[name])}
    assert moved == moving
    assert {kind(n) for n, p in made.student.named_parameters() if p.requires_grad} == (
        moving - {"statistics"}
    )


def test_a_teacher_never_leaves_eval_mode(tmp_path):
    made = method(tmp_path, distill="hinton").train()
    assert made.teacher is not None and not any(m.training for m in made.teacher.modules())
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    assert made(batch())["loss"].requires_grad
    assert all(
        torch.equal(value, before[name]) for name, value in made.teacher.state_dict().items()
    )
    # Its dropout is off, and what it says of an image does not hang on the others.
    [together], [one] = made.targets(batch().image), made.targets(batch().image[:1])
    assert torch.allclose(together[:1], one, atol=1e-5)
    assert not any(p.requires_grad for p in made.teacher.parameters())


@pytest.mark.parametrize("distill", ["none", "hinton", "rkd_distance", "rkd_angle"])
def test_validation_is_cross_entropy_whatever_is_distilled(tmp_path, distill):
    made, here = method(tmp_path, distill=distill).eval(), batch()
    said = made.predict(here.image)
    assert said.logits is not None and here.label is not None and said.pred_score is not None
    expected = F.cross_entropy(said.logits, here.label, reduction="none")
    assert torch.allclose(made(here)["loss"], expected)
    assert torch.equal(said.pred_score, said.logits.softmax(1).amax(1))


def test_losses_are_weighted_as_the_configuration_says(tmp_path):
    made, here = method(tmp_path, distill="hinton", alpha=0.3, temperature=2.0).train(), batch()
    found = made(here)
    expected = 0.3 * found["distillation"] + 0.7 * found["cross_entropy"]
    assert torch.allclose(found["loss"], expected)
    made = method(tmp_path, distill="rkd_angle", relation_weight=7.0).train()
    found = made(here)
    assert torch.allclose(found["loss"], found["cross_entropy"] + 7 * found["distillation"])


def test_cached_logits_of_the_teacher_give_the_same_loss(tmp_path):
    made, here = method(tmp_path, distill="hinton", cache_teacher=True).train(), batch()
    kept = Batch(here.image, here.row, here.seed, made.targets(here.image), here.label)
    expected = made(here)["loss"]
    assert torch.equal(made(kept)["loss"], expected)


def test_the_two_halves_of_a_classifier_are_the_whole(tmp_path):
    student, image = method(tmp_path).student.eval(), batch().image
    assert torch.allclose(student.classify(student.features(image)), student(image))  # pyright: ignore
    assert student(image[:0]).shape == (0, len(CLASSES))


def test_a_transformer_is_a_classifier_too():
    network = assemble("test_vit", "original", 3, 160).eval()
    image = torch.rand(2, 3, 160, 160)
    assert network(image).shape == (2, 3) and network(image[:0]).shape == (0, 3)
