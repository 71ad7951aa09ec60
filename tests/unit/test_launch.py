import pytest
import torch
from torch._inductor import config as inductor

from kdad_dist.errors import UsageError
from kdad_dist.runtime import launch


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("accelerate launch --cpu --num_processes 2 -m kdad_dist train x", [2]),
        ("/usr/bin/python /env/bin/accelerate launch --num_processes=3 -m kdad_dist train x", [3]),
        ("python -m accelerate.commands.launch --num-processes 4 -m kdad_dist score r", [4]),
        ("accelerate launch -m kdad_dist train x --num_processes 9", []),
        ("bash -c kdad", []),
        ("", []),
    ],
)
def test_the_request_is_read_from_the_launchers_own_options(command, expected):
    assert [request.world for request in launch.requests({}, command.split())] == expected


def test_the_request_is_read_from_the_launchers_config_file(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    command = f"accelerate launch --config_file {file} -m kdad_dist train x".split()
    [request] = launch.requests({}, command)
    assert request.world == 2
    assert str(file) in request.source


def test_the_environment_of_a_launch_is_a_request_too():
    found = launch.requests({"KDAD_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, [])
    assert [request.world for request in found] == [4, 2]


def test_fewer_processes_than_asked_for_are_refused(monkeypatch):
    monkeypatch.setenv("KDAD_WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "parent_command", list)
    with pytest.raises(UsageError, match="asks for 2 processes, but 1 came up"):
        launch.check(1, "NO")
    launch.check(2, "MULTI_CPU")


def test_without_a_compiler_nothing_is_compiled_on_the_cpu():
    absent = inductor.patch({"cpp.cxx": (None, "absent-c++")})
    with (
        absent,
        pytest.raises(UsageError, match=r"(?s)a C\+\+ compiler, .*compile=false"),
    ):
        launch.check_compiler()


def test_the_mode_is_what_the_launcher_asks_for():
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert launch.asked_mode({}) == "ddp"
    assert launch.asked_mode(asked) == "fsdp2"
    with pytest.raises(UsageError, match="FSDP version 1"):
        launch.asked_mode(asked | {"FSDP_VERSION": "1"})
    assert launch.asked_mode({"ACCELERATE_USE_DEEPSPEED": "true"}) == "zero"


def test_a_cpu_instead_of_gpus_is_refused(monkeypatch):
    launch.check_device(on_cpu=True)
    monkeypatch.setenv("KDAD_DEVICE", "gpu")
    launch.check_device(on_cpu=False)
    with pytest.raises(UsageError, match="asks for GPUs"):
        launch.check_device(on_cpu=True)


def test_an_unwrapped_student_among_several_processes_is_refused():
    launch.check_wrapper(torch.nn.Linear(2, 2), 1, "ddp")
    for world, mode in ((2, "ddp"), (2, "fsdp2"), (1, "fsdp2"), (1, "zero2")):
        with pytest.raises(UsageError, match="plain Linear"):
            launch.check_wrapper(torch.nn.Linear(2, 2), world, mode)


def test_a_precision_that_would_be_dropped_in_silence_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch.check_precision("train.precision", "bf16")
    with pytest.raises(UsageError, match=r"asks for bf16.*train\.precision is no"):
        launch.check_precision("train.precision", "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launch.check_precision("train.precision", "bf16")
