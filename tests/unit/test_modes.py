"""What a mode cannot do is refused before anything is wrapped."""

import pytest

from kdad_dist.cli.choices import Mode
from kdad_dist.config.load import load
from kdad_dist.errors import ConfigError
from kdad_dist.methods import build_method
from kdad_dist.runtime.account import SHARDED
from kdad_dist.runtime.launch import WRAPPERS
from kdad_dist.runtime.modes import MODES, refuse_mode


@pytest.mark.parametrize(
    ("setting", "modes"),
    [
        ("train.precision=fp16", {"zero1", "zero2", "zero3"}),
        ("train.compile=true", {"zero3"}),
        ("train.precision=bf16", set()),
    ],
)
def test_only_the_modes_that_cannot_work_are_refused_and_say_why(setting: str, modes: set[str]):
    words = ["data.shards=none", "method.teacher.weights=random", setting]
    config = load("stfpm_mvtec", words)
    method = build_method(config)
    refused = set()
    for mode in MODES:
        try:
            refuse_mode(config, method, mode)
        except ConfigError as error:
            assert setting.partition("=")[0] in error.problem and mode in error.problem
            refused.add(mode)
    assert refused == modes


def test_two_networks_that_take_turns_are_refused_where_one_optimizer_holds_all_weights():
    config = load("stfpm_mvtec", ["data.shards=none", "method.teacher.weights=random"])
    method = build_method(config)
    method.parts = ("classifier", "discriminator")
    for mode in MODES:
        if mode.startswith("zero"):
            with pytest.raises(ConfigError, match=rf"classifier and discriminator .* \({mode}\)"):
                refuse_mode(config, method, mode)
        else:
            refuse_mode(config, method, mode)


def test_all_that_is_said_of_modes_is_said_of_the_same_ones():
    assert list(MODES) == list(Mode) == list(SHARDED) == list(WRAPPERS)
