"""Memory of a pass that nobody computed, against the same pass computed and counted."""

import copy

import pytest
import torch

from kdad_dist.config.methods import LoraMaeConfig, StfpmConfig, TeacherConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.runtime.activations import activations, pass_peak

SIDE = 64


def stfpm(cached: bool = False) -> Method:
    teacher = TeacherConfig("resnet10t", "random", [1, 2])
    return Stfpm(StfpmConfig(teacher=teacher, cache_teacher=cached), 0)


def loramae(checkpointing: bool = False) -> Method:
    config = LoraMaeConfig(
        preset="mae_vit_tiny_patch8",
        weights="random",
        freeze_random=True,
        activation_checkpointing=checkpointing,
    )
    return LoraMae(config, SIDE, 0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "method", [stfpm(), stfpm(cached=True), loramae(), loramae(checkpointing=True)]
)
def test_what_is_foretold_is_what_a_real_pass_holds(method: Method, precision: str) -> None:
    foretold = activations(method, 4, SIDE, precision)
    real = pass_peak(copy.deepcopy(method).train(), 4, SIDE, precision)
    assert foretold == pytest.approx(real, rel=1e-3)


def test_memory_grows_by_the_image() -> None:
    three, six, nine = (activations(stfpm(), images, SIDE, "no") for images in (3, 6, 9))
    assert nine - six == pytest.approx(six - three, rel=1e-3)
    assert six - three > 3 * 3 * SIDE**2 * 4  # at the least the images themselves
    assert activations(stfpm(), 0, SIDE, "no") == 0


def test_half_precision_and_checkpointing_take_less() -> None:
    assert activations(stfpm(), 4, SIDE, "bf16") < 0.8 * activations(stfpm(), 4, SIDE, "no")
    kept, again = (activations(loramae(flag), 16, SIDE, "no") for flag in (False, True))
    assert again < 0.5 * kept


def test_the_backward_pass_finds_at_least_what_autograd_saved() -> None:
    method, saved = loramae().train(), {}
    weights = {t.untyped_storage().data_ptr() for t in [*method.parameters(), *method.buffers()]}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        peak = pass_peak(method, 4, SIDE, "no")
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    assert 0.5 * peak < kept <= peak


def test_nothing_of_the_method_is_changed() -> None:
    method = stfpm().eval()
    before = copy.deepcopy(method.state_dict())
    state = torch.get_rng_state()
    activations(method, 2, SIDE, "no")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters()) and not method.training
