"""Two networks of one student, trained in turns by an optimizer each."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.config.load import load
from kdad_dist.config.run import RunConfig
from kdad_dist.methods.base import Method
from kdad_dist.models.discriminator import Rivals
from kdad_dist.runtime import session
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation
from kdad_dist.runtime.engine import Native
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.session import Session
from kdad_dist.types import Batch, Losses, Prediction

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TARGET = 3 * torch.randn(4, 10, generator=torch.Generator().manual_seed(2))


class Duel(Method):
    """Two steps of the discriminator, then two of the classifier, and so on."""

    parts = ("classifier", "discriminator")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(6, 10),
            )  # fmt: skip
        self.student = Rivals(body, 10, seed=0, temperature=1.5)

    def whose_turn(self, step: int) -> str:
        return self.parts[step % 4 < 2]

    def forward(self, batch: Batch) -> Losses:
        _, fake, real = self.student(batch.image, TARGET, self.turn)
        return {"loss": F.softplus(-fake) if real is None else F.softplus(fake) + F.softplus(-real)}

    def predict(self, image: Float[Tensor, "b 3 h w"]) -> Prediction:
        return Prediction()


@pytest.fixture
def here() -> Iterator[Session]:
    with session.start() as joined:
        yield joined


def settings(*more: str) -> RunConfig:
    words = ["data.shards=none", "optim.name=adam", "optim.lr=1e-3", "optim.weight_decay=1e-2"]
    return load("stfpm_mvtec", [*words, "optim.betas=[0.9,0.999]", *more])


def take(engine: Native, method: Method, steps: range) -> None:
    for step in steps:
        method.turn = method.whose_turn(step)
        number = torch.zeros(4, dtype=torch.int64)
        engine.backward(method(Batch(IMAGES, number, number))["loss"].mean())
        engine.step(1e-3 * (step + 1), method.turn)


def test_the_weights_are_those_of_two_optimizers_written_out_bit_for_bit(here: Session):
    method = Duel()
    twin = copy.deepcopy(method.student)
    engine = Native(settings("optim.clip=0.1"), method, here)
    take(engine, method, range(10))
    nets = {name: getattr(twin, name) for name in Duel.parts}
    optimizers = {
        name: torch.optim.Adam(net.parameters(), weight_decay=1e-2, fused=True)
        for name, net in nets.items()
    }
    for step in range(10):
        turn = Duel.parts[step % 4 < 2]
        answer = F.log_softmax(nets["classifier"](IMAGES) / 1.5, dim=1)
        if turn == "classifier":
            loss = F.softplus(-nets["discriminator"](answer)).mean()
        else:
            fake = nets["discriminator"](answer.detach())
            real = nets["discriminator"](F.log_softmax(TARGET / 1.5, dim=1))
            loss = (F.softplus(fake) + F.softplus(-real)).mean()
        for net in nets.values():
            net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nets[turn].parameters(), 0.1)
        optimizers[turn].param_groups[0]["lr"] = 1e-3 * (step + 1)
        optimizers[turn].step()
    for name, value in method.student.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_who_rests_keeps_weights_and_moments(here: Session):
    method = Duel()
    engine = Native(settings(), method, here)
    take(engine, method, range(4))
    before = copy.deepcopy(engine.contents.collect())  # type: ignore
    take(engine, method, range(4, 5))
    moved = {name for name, v in engine.contents.collect().items() if not v.equal(before[name])}  # type: ignore
    own = {name for name in before if ".discriminator." in f".{name}"}
    assert moved and moved <= own
    assert {"optimizer.discriminator.layers.0.weight.step"} < moved


def test_a_checkpoint_in_the_middle_of_a_turn_resumes_to_the_same_bits(
    here: Session, tmp_path: Path
):
    checkpoints = CheckpointManager(tmp_path, Rotation(1), {})
    for saved in (1, 5):  # before the classifier's optimizer has any moments, and after
        method, other = Duel(), Duel()
        engine = Native(settings(), method, here)
        take(engine, method, range(saved))
        path = checkpoints.save(engine.contents, TrainState(saved, 4 * saved), {})
        take(engine, method, range(saved, 9))
        resumed = Native(settings(), other, here)
        nn.init.zeros_(other.student.discriminator.layers[0].weight)  # type: ignore
        state = checkpoints.load(path, resumed.contents)
        take(resumed, other, range(state.step, 9))
        expected = engine.contents.collect()  # type: ignore
        found = resumed.contents.collect()  # type: ignore
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
