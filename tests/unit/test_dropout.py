"""What an image loses by dropout hangs on its own seed, on the layer, and on nothing else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdad_dist.config.classkd import ClassifierConfig
from kdad_dist.config.methods import LoraConfig, LoraMaeConfig
from kdad_dist.errors import ConfigError
from kdad_dist.methods.base import Method
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.models.backbone_classifier import KnownClassifier, build_classifier
from kdad_dist.models.dropout import RowDropout, drop_by
from kdad_dist.types import Batch
from tests.methods import batch, gradients, make_mkd, make_stfpm, make_vitkd


def no_run(run: Path) -> KnownClassifier:
    raise AssertionError(run)


SEEDS = torch.tensor([5, -7, 1 << 60, 11])


def dropped(rate: float, seed: Tensor, *shape: int) -> Tensor:
    layer = RowDropout(rate)
    drop_by(layer, seed)
    return layer(torch.ones(len(seed), *shape))


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 7, 7)])
def test_a_row_loses_the_same_whatever_stands_beside_it(shape: tuple[int, ...]) -> None:
    together = dropped(0.5, SEEDS, *shape)
    order = [2, 0]
    assert torch.equal(dropped(0.5, SEEDS[order], *shape), together[order])
    assert torch.equal(dropped(0.5, SEEDS[3:], *shape), together[3:])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9])
def test_the_rate_is_kept_in_each_row_and_the_mean_stays(rate: float) -> None:
    given = dropped(rate, SEEDS, 400_000)
    error = (rate * (1 - rate) / 400_000) ** 0.5
    assert ((given == 0).float().mean(dim=1) - rate).abs().max() < 4 * error
    assert (given.mean(dim=1) - 1).abs().max() < 5 * error / (1 - rate)
    neighbours = (given[:, 1:] == 0) & (given[:, :-1] == 0)  # as independent numbers are
    assert (neighbours.float().mean(dim=1) - rate**2).abs().max() < 6 * error


def test_layers_lose_different_values_and_gradients_are_of_what_is_left() -> None:
    network = nn.Sequential(RowDropout(0.5), nn.Identity(), RowDropout(0.5))
    drop_by(network, SEEDS)
    values = torch.ones(4, 1000, requires_grad=True)
    given = network(values)
    assert ((given == 0).float().mean() - 0.75).abs() < 0.05
    given.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, given)


def test_nothing_is_lost_in_eval_mode_or_at_rate_0_and_no_rows_stay_none() -> None:
    values = torch.rand(3, 4)
    assert RowDropout(0.5).eval()(values) is values and RowDropout(0.0)(values) is values
    assert dropped(0.5, SEEDS[:0], 4).shape == (0, 4)


def test_torchs_generator_is_not_asked() -> None:
    before = torch.get_rng_state()
    dropped(0.5, SEEDS, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_transformer_in_training_judges_each_image_alone() -> None:
    method, both = make_vitkd().train(), batch(2)
    expected = method(both)["loss"]
    one = Batch(both.image[1:], both.row[1:], both.seed[1:])
    torch.testing.assert_close(method(one)["loss"], expected[1:])
    other = Batch(both.image, both.row, both.seed + 2)
    assert (method(other)["loss"] != expected).all()


def test_a_branch_is_dropped_as_a_whole_by_the_image() -> None:
    layer, seed = RowDropout(0.25, whole=True), torch.arange(4000)
    drop_by(layer, seed)
    given = layer(torch.ones(4000, 3, 2))
    assert (given == given[:, :1, :1]).all() and len(given.unique()) == 2
    assert given.mean() == pytest.approx(1, abs=5 * (0.25 * 0.75 / 4000) ** 0.5 / 0.75)


@pytest.mark.parametrize(
    "make", [make_stfpm, partial(make_mkd, student="same", balance=True, value_weight=1.0)]
)
def test_a_student_that_drops_branches_learns_the_same_on_any_number_of_processes(
    make: Callable[..., Method],
) -> None:
    method = make("focalnet_tiny_srf", layers=(0, 1)).train()
    paths = [m for m in method.student.modules() if isinstance(m, RowDropout)]
    assert [layer.rate for layer in paths if layer.rate] and all(layer.whole for layer in paths)
    for layer in paths:
        layer.rate = 0.5
    both = batch(4)
    method.prepare(both.image)
    before, expected = torch.get_rng_state(), method(both)["loss"]
    parts = [Batch(both.image[i::2], both.row[i::2], both.seed[i::2]) for i in (0, 1)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(method(part)["loss"], expected[i::2])
    other = Batch(both.image, both.row, both.seed + 4)
    assert (method(other)["loss"] != expected).any()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["rexnet_100", "ghostnet_050"])
def test_a_student_whose_dropout_is_drawn_for_the_batch_is_refused(name: str) -> None:
    config = ClassifierConfig(backbone=name, weights="random")
    with pytest.raises(ConfigError, match="draws for a batch as a whole"):
        build_classifier(config, 3, 32, 0, no_run)


def test_what_is_computed_again_in_the_backward_pass_loses_the_same() -> None:
    def found(activation_checkpointing: bool) -> list[Tensor | None]:
        config = LoraMaeConfig(
            preset="mae_vit_tiny_patch8",
            weights="random",
            freeze_random=True,
            lora=LoraConfig(dropout=0.5),
            activation_checkpointing=activation_checkpointing,
        )
        method = LoraMae(config, 32, 0).train()
        return gradients(method, method(batch(2)))

    kept, again = found(False), found(True)
    for one, other in zip(kept, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (other is not None and torch.equal(one, other))
