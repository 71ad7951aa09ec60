"""The duel of a student and the discriminator of its answers: losses, weights and schedule."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdad_dist.config.load import load
from kdad_dist.errors import ConfigError
from kdad_dist.methods.classkd import Classkd
from kdad_dist.methods.distill_losses import mistaken, unconvinced
from kdad_dist.models.backbone_classifier import KnownClassifier, assemble
from kdad_dist.runtime.loaders import refuse_idle_student
from kdad_dist.types import Batch

CLASSES = [f"class{i}" for i in range(10)]
YAML = f"""
name: duel
data: {{shards: none, classes: [{", ".join(CLASSES)}], image_size: 32}}
method:
  name: classkd
  network: {{backbone: resnet10t, weights: random}}
  teacher: {{weights: teacher}}
  distill: discriminator
optim: {{name: adam, lr: 1.0e-3}}
train: {{steps: 1}}
"""


def teacher(path: Path) -> KnownClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = assemble("resnet10t", "linear", 10, 32)
    return KnownClassifier(str(path), "resnet10t", "linear", CLASSES, network.state_dict())


@pytest.fixture
def duel(tmp_path: Path) -> Classkd:
    (tmp_path / "teacher").mkdir()
    path = tmp_path / "duel.yaml"
    path.write_text(YAML.replace("weights: teacher", f"weights: {tmp_path / 'teacher'}"))
    config = load(path)
    return Classkd(config.method, CLASSES, 32, 0, teacher)  # type: ignore


def batch() -> Batch:
    random = torch.Generator().manual_seed(1)
    number = torch.arange(6)
    return Batch(torch.rand(6, 3, 32, 32, generator=random), number, number, None, number)


def test_the_losses_are_binary_cross_entropy():
    verdict, on_teacher = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, -1.0])
    ones, zeros = torch.ones(3), torch.zeros(3)

    def entropy(logit: torch.Tensor, is_teacher: torch.Tensor) -> torch.Tensor:
        probability = logit.sigmoid()
        return F.binary_cross_entropy(probability, is_teacher, reduction="none")

    assert torch.allclose(unconvinced(verdict), entropy(verdict, ones))
    both = (entropy(verdict, zeros) + entropy(on_teacher, ones)) / 2
    assert torch.allclose(mistaken(verdict, on_teacher), both)
    assert mistaken(zeros, zeros)[0] == pytest.approx(math.log(2))


def test_the_seed_trains_the_student_for_179_of_200_steps(duel: Classkd):
    turns = [duel.whose_turn(step) for step in range(400)]
    assert turns == ["classifier" if step % 200 > 20 else "discriminator" for step in range(400)]


def test_the_student_learns_labels_and_to_be_taken_for_its_teacher(duel: Classkd):
    losses = duel(batch())
    student = duel.student
    logits = student.classifier(batch().image)  # type: ignore
    verdict = student.discriminator(F.log_softmax(logits / 1.5, dim=1))  # type: ignore
    entropy = F.cross_entropy(logits, batch().label, reduction="none")  # type: ignore
    expected = 0.5 * 1.5**2 * F.softplus(-verdict) + 0.5 * entropy
    assert torch.allclose(losses["loss"], expected, atol=1e-5)
    assert losses["loss"].shape == (6,) and losses["loss"].requires_grad


def test_the_discriminator_learns_to_tell_answers_apart(duel: Classkd):
    duel.turn = "discriminator"
    losses = duel(batch())
    losses["loss"].sum().backward()
    assert all((p.grad is None) == ("discriminator" not in n) for n, p in duel.named_parameters())
    assert torch.equal(losses["loss"], losses["discriminator"])
    assert not losses["cross_entropy"].requires_grad


def test_the_held_out_images_measure_the_classifier_alone(duel: Classkd):
    duel.eval()
    for duel.turn in ("classifier", "discriminator"):
        losses = duel(batch())
        assert torch.equal(losses["loss"], losses["cross_entropy"])
        assert "discriminator" not in losses
    assert duel.predict(batch().image).logits.shape == (6, 10)  # type: ignore


def test_what_is_exported_is_the_classifier_alone(duel: Classkd):
    assert duel.network.state_dict().keys() == duel.teacher.state_dict().keys()  # type: ignore


def test_a_network_beside_is_refused_where_nothing_is_compared(tmp_path: Path):
    path = tmp_path / "duel.yaml"
    path.write_text(YAML)
    said = r"compared with only where explain=true.*method\.beside=null"
    with pytest.raises(ConfigError, match=said):
        load(path, ["method.beside.weights=elsewhere"])


def test_turns_that_leave_the_student_none_are_refused(tmp_path: Path):
    path = tmp_path / "duel.yaml"
    path.write_text(YAML)
    with pytest.raises(ConfigError, match="discriminator must be below period, 21"):
        load(path, ["method.turns.period=21"])


@pytest.mark.parametrize(
    ("words", "steps"), [(["train.steps=21"], 21), (["train.steps=null", "train.epochs=2"], 4)]
)
def test_a_training_that_ends_before_the_students_turn_is_refused(tmp_path, words, steps):
    path = tmp_path / "duel.yaml"
    path.write_text(YAML)
    samples: Any = range(33)  # two steps of an epoch
    said = rf"never be trained.* first 21 steps \(method.turns.discriminator\) of {steps} in all"
    with pytest.raises(ConfigError, match=said):
        refuse_idle_student(load(path, words), samples)
    refuse_idle_student(load(path, ["train.steps=22"]), samples)
    refuse_idle_student(load(path, [*words, f"method.turns.discriminator={steps - 1}"]), samples)
    refuse_idle_student(load(path, [*words, "method.distill=hinton"]), samples)
