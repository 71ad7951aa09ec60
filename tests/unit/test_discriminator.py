"""Two networks that compete: each learns in its own turn alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdad_dist.errors import ConfigError
from kdad_dist.methods.distill_losses import mistaken
from kdad_dist.models.discriminator import Discriminator, Rivals


def test_for_ten_classes_it_has_the_published_size_less_two_normalisations():
    network = Discriminator(10)
    assert sum(p.numel() for p in network.parameters()) == 285 - 2 * 4 - 2 * 16
    lengths, values = [], torch.randn(2, 1, 10)
    for layer in network.layers:
        values = layer(values)
        lengths.append(values.shape[-1])
    assert lengths == [7, 7, 5, 3, 3, 1, 16, 1]


def test_it_takes_any_number_of_classes_that_its_windows_fit_on_and_refuses_fewer():
    assert Discriminator(100)(torch.randn(3, 100)).shape == (3,)
    with pytest.raises(ConfigError, match="10 classes or more, and the data has 9"):
        Discriminator(9)


def test_a_process_without_images_takes_part():
    network = Discriminator(10).eval()
    assert network(torch.empty(0, 10)).shape == (0,)


def rivals() -> Rivals:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(6, 10),
        )  # fmt: skip
    return Rivals(body, 10, seed=0, temperature=1.5)


def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 8, 8, generator=random), 3 * torch.randn(4, 10, generator=random)


@pytest.mark.parametrize("turn", ["classifier", "discriminator"])
def test_a_turn_has_gradients_in_its_own_network_and_none_in_the_other(turn: str):
    student = rivals()
    logits, fake, real = student(*batch(), turn)
    loss = fake if real is None else F.softplus(-real) + F.softplus(fake)
    assert logits.requires_grad == (turn == "classifier") and (real is None) == logits.requires_grad
    loss.sum().backward()
    for name, parameter in student.named_parameters():
        if name.startswith(turn):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    learned = [p.grad.abs().sum() for p in getattr(student, turn).parameters()]
    assert sum(learned) > 0


def test_the_gradient_goes_through_the_resting_discriminator_as_through_any_function():
    student, (image, target) = rivals(), batch()
    _, fake, _ = student(image, target, "classifier")
    fake.sum().backward()
    found = student.classifier[5].weight.grad.clone()  # type: ignore
    student.zero_grad()
    answer = F.log_softmax(student.classifier(image) / 1.5, dim=1)
    student.discriminator(answer).sum().backward()
    assert torch.equal(found, student.classifier[5].weight.grad)  # type: ignore


def test_both_networks_answer_in_the_same_space():
    student, (image, _) = rivals(), batch()
    student.eval()  # the same statistics for both passes of the classifier
    logits = student.classifier(image).detach()
    _, fake, real = student(image, logits + 7, "discriminator")  # an offset says nothing
    assert torch.allclose(fake, real, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_it_learns_to_tell_answers_by_their_confidence_alone(scale: float):
    """Student and teacher rank the classes alike; only the scale of their logits differs."""
    student = rivals()
    judge, random = student.discriminator, torch.Generator().manual_seed(3)

    def verdicts() -> tuple[Tensor, Tensor]:
        logits = 3 * torch.randn(64, 10, generator=random)
        teacher, pupil = ((k * logits / 1.5).log_softmax(1) for k in (1, scale))
        return judge(pupil), judge(teacher)

    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        mistaken(*verdicts()).mean().backward()
        optimizer.step()
    fake, real = verdicts()
    right = torch.cat([fake < 0, real > 0]).float().mean()
    assert right > 0.85 and mistaken(fake, real).mean() < 0.4  # log 2 where it is blind


def test_an_answer_is_judged_by_itself():
    judge, answers = rivals().discriminator, batch()[1].log_softmax(1)
    assert torch.allclose(judge(answers)[:1], judge(answers[:1]), atol=1e-6)
