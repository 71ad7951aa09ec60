"""Did the launcher start what it was asked to start?

Several plausible settings of `accelerate launch` start one process instead of N, or N that never
talk to each other, and exit with 0 (docs/cluster.md lists them). So the request is read from the
environment and, on Linux, from the launcher's own command line, and compared with what came up.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from kdad_dist.errors import UsageError

log = logging.getLogger(__name__)

ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""By these variables a launcher asks for more than DDP."""
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPModule",
    **dict.fromkeys(("zero1", "zero2", "zero3"), "DeepSpeedEngine"),
}
"""By the name of its class: DeepSpeed need not be installed."""


@dataclass(frozen=True)
class Request:
    """How many processes were asked for, and by whom."""

    world: int
    source: str


def requests(environment: Mapping[str, str], parent: Sequence[str]) -> list[Request]:
    """Every trace of a number of processes that the launcher left."""
    found = [
        Request(int(environment[name]), f"the environment variable {name}")
        for name in ("KDAD_WORLD_SIZE", "WORLD_SIZE")
        if environment.get(name, "").isdigit()
    ]
    return found + _of_accelerate(launcher_arguments(parent))


def launcher_arguments(command: Sequence[str]) -> list[str]:
    """The arguments of `accelerate launch` itself, without those of the program it starts."""
    words = list(command)
    start = next(
        (
            i + 1
            for i, word in enumerate(words)
            if word.endswith(("accelerate.commands.launch", "accelerate-launch"))
            or (word == "launch" and i > 0 and Path(words[i - 1]).name == "accelerate")
            or word.endswith(("accelerate/commands/launch.py",))
        ),
        len(words),
    )
    rest = words[start:]
    program = next(
        (
            i
            for i, word in enumerate(rest)
            if word in {"-m", "--module", "kdad_dist"} or Path(word).name in {"kdad", "kdad_dist"}
        ),
        len(rest),
    )
    return rest[:program]


def _of_accelerate(arguments: Sequence[str]) -> list[Request]:
    """What the options, or else the config file, of `accelerate launch` ask for."""
    number = _option(arguments, "--num_processes", "--num-processes", "-n")
    if number is not None and number.isdigit():
        return [Request(int(number), "accelerate launch --num_processes")]
    file = _option(arguments, "--config_file", "--config-file")
    if file is None or not Path(file).is_file():
        return []
    settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if isinstance(settings, dict) and isinstance(settings.get("num_processes"), int):
        return [Request(settings["num_processes"], f"num_processes in {file}")]
    return []


def _option(arguments: Sequence[str], *names: str) -> str | None:
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(arguments[i + 1 :]), None)
    return None


def parent_command() -> list[str]:
    """The command line of the parent process; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in text.split(b"\0") if word]


def check(world: int, wrapper: str) -> None:
    """Refuses a launch that differs from its request.

    Args:
        world: processes that really talk to each other.
        wrapper: accelerate's name of the mode that is in force, such as `MULTI_CPU`.

    Raises:
        UsageError: fewer or more processes came up than were asked for, or another engine.
    """
    for request in requests(os.environ, parent_command()):
        if request.world != world:
            raise UsageError(
                f"{request.source} asks for {request.world} processes, but {world} came up "
                f"(mode {wrapper}): the launcher's settings do not do what they say",
                "launch with launch/train.sh or --config_file launch/accelerate/cpu.yaml (GPU: "
                "multi_gpu.yaml) and --num_processes N; see docs/cluster.md",
            )


def asked_mode(environment: Mapping[str, str]) -> str:
    """The mode that the launcher asks for: ddp, fsdp2, or zero of a stage that stands elsewhere.

    Raises:
        UsageError: this program does not train in that mode.
    """

    def said(name: str) -> bool:
        return environment.get(name, "").lower() in {"true", "1"}

    if said("ACCELERATE_USE_DEEPSPEED"):
        return "zero"
    if not said("ACCELERATE_USE_FSDP"):
        return "ddp"
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UsageError(
            f"the launcher asks for FSDP version {version} (FSDP_VERSION)",
            "set fsdp_version: 2, as launch/accelerate/fsdp2.yaml does",
        )
    return "fsdp2"


def check_device(on_cpu: bool) -> None:
    """Refuses to use the CPU where the launch scripts were told to use GPUs.

    Raises:
        UsageError: there is none that torch can use.
    """
    if on_cpu and os.environ.get("KDAD_DEVICE") == "gpu":
        raise UsageError(
            "the launch asks for GPUs (KDAD_MODE), and torch finds none that it can use here",
            "see what nvidia-smi says; to use the CPU, launch with KDAD_MODE=cpu, or with "
            "KDAD_DEVICE=cpu where the mode is fsdp2 or zero1 to zero3",
        )


def check_precision(key: str, precision: str) -> None:
    """Refuses a precision that the launcher was given and that the configuration overrules.

    Args:
        key: where in the configuration `precision` stands.

    Raises:
        UsageError: the launcher asks for another one.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in {"no", precision}:
        raise UsageError(
            f"the launcher asks for {asked} (--mixed_precision, or its config file), but "
            f"{key} is {precision}, and that decides",
            f"launch with --mixed_precision no, and set {key} where another one is wanted",
        )


def check_compiler() -> None:
    """Asks at the start what torch.compile asks amid the first step on a CPU.

    Raises:
        UsageError: this machine has no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "train.compile=true needs a C++ compiler, and torch finds none here",
            "install one (on Debian or Ubuntu: apt-get install g++), name yours in CXX, or set "
            "train.compile=false",
        ) from None


def check_wrapper(student: nn.Module, world: int, mode: str) -> None:
    """Refuses a student whose gradients would not be shared between the processes.

    Raises:
        UsageError: several processes, and not the wrapper of the mode around the student.
    """
    wrapper = type(student).__name__
    shares = WRAPPERS[mode] in {kind.__name__ for kind in type(student).mro()}
    if not shares and (world > 1 or mode != "ddp"):
        raise UsageError(
            f"{world} processes are connected under {mode}, but the student is a plain {wrapper}: "
            "each would train its own copy",
            "launch with launch/train.sh; see docs/cluster.md",
        )
    if shares:
        log.info("student: %s", wrapper)
