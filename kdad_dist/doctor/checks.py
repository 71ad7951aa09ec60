"""`kdad doctor`: what this machine can do, and what on it would break a run.

A finding is a problem only where a run, or a way to start one that is set up here, would fail;
what is merely missing is a note. Each comes with what to do about it.
"""

import importlib.util
import netrc
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kdad_dist import __version__
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import KdadError
from kdad_dist.runtime.progress import uncounted
from kdad_dist.runtime.stopping import interrupts_prevail

OK, NOTE, PROBLEM = "ok", "note", "problem"
HUB_PATIENCE = 2.0
"""Seconds."""
SLURM_PATIENCE = 5.0
SMALL_SHM = 2**26
"""Bytes of /dev/shm that a container has unless told otherwise; NCCL wants more."""
FEW_FILES = 1024
DRIVER = Path("/proc/driver/nvidia/version")
GPU_MODES = ("gpu", "multi_gpu", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """OK, NOTE or PROBLEM."""
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of the doctor."""

    config: RunConfig | None
    directories: Sequence[Path]
    """Where runs or caches are to be written."""
    processes: int | None
    """To start and connect."""


Check = Callable[[Request], Iterator[Finding]]


def examine(request: Request, checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """What checks find; one that cannot even be carried out has found a problem.

    A problem that stops several checks is one, told by the first of them.
    """
    told: dict[str, str] = {}
    for name, check in checks:
        try:
            with uncounted(f"looking at {name}"), interrupts_prevail():
                yield from check(request)
        except KdadError as error:
            first = told.setdefault(error.problem, name)
            if first == name:
                yield Finding(name, PROBLEM, error.problem, error.remedy)
            else:
                yield Finding(name, NOTE, f"stopped by the same problem as {first}, above")
        except Exception as error:  # noqa: BLE001 - a library that cannot be imported, say
            why = f"{type(error).__name__}: {error}"
            yield Finding(name, PROBLEM, why, "mend what the error names; reinstall, perhaps")


def python(_: Request) -> Iterator[Finding]:
    found = f"{platform.python_version()} ({sys.executable}), kdad_dist {__version__}"
    yield Finding("python", OK, found)
    cores, files = len(os.sched_getaffinity(0)), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    found = f"{cores} cores (OMP_NUM_THREADS {threads}), {files} open files"
    few = 0 <= files < FEW_FILES
    remedy = "ulimit -n 4096: each process keeps files of shards and checkpoints open"
    yield Finding("process", NOTE if few else OK, found, remedy if few else None)


def devices(_: Request) -> Iterator[Finding]:
    """torch, and the GPUs that it can really use."""
    import torch

    build = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    driver = driver_version()
    told = f", NVIDIA driver {driver}" if driver else ""
    yield Finding("torch", OK, f"{torch.__version__}, built {build}{told}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            square = torch.ones(64, 64, device=f"cuda:{i}")
            (square @ square).sum().item()  # raises where it cannot be used after all
            name = torch.cuda.get_device_name(i)
            said = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding(f"GPU {i}", OK, said)
        return
    mode, device = os.environ.get("KDAD_MODE"), os.environ.get("KDAD_DEVICE")
    if device == "gpu" or (mode in GPU_MODES and device != "cpu"):
        remedy = "see what nvidia-smi says; or unset KDAD_MODE (on a CPU: KDAD_DEVICE=cpu)"
        asked = f"KDAD_MODE={mode} asks for GPUs, and torch finds none that it can use"
        yield Finding("GPU", PROBLEM, asked, remedy)
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        remedy = "install a torch for the CUDA of the driver that nvidia-smi names"
        found = "there is an NVIDIA driver, but torch finds no GPU that it can use"
        yield Finding("GPU", PROBLEM, found, remedy)
    else:
        yield Finding("GPU", OK, "none; training takes the CPU")


def driver_version() -> str | None:
    """That of NVIDIA's kernel module, such as 560.35.03; None where it does not say."""
    try:
        said = DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", said)
    return found[1] if found else None


def backends(_: Request) -> Iterator[Finding]:
    """What processes talk through, and the shared memory that NCCL needs for it."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name, there, needed in (
        ("gloo", dist.is_gloo_available(), True),
        ("NCCL", dist.is_nccl_available(), gpus > 0),
    ):
        remedy = None if there or not needed else "install a torch that was built with it"
        found = "available" if there else "not in this torch"
        if name == "NCCL" and there and gpus:
            found = ".".join(map(str, nccl.version()))
        yield Finding(name, PROBLEM if remedy else OK, found, remedy)
    try:
        size = shutil.disk_usage("/dev/shm").total  # noqa: S108
    except OSError:
        yield Finding("shared memory", NOTE, "there is no /dev/shm", "NCCL needs it")
        return
    found = f"{size / 2**30:.2f} GiB in /dev/shm"
    small = "in a container: docker run --shm-size=1g, or --ipc=host"
    state = OK if size > SMALL_SHM else PROBLEM if gpus > 1 else NOTE
    yield Finding("shared memory", state, found, None if state == OK else small)


def launchers(_: Request) -> Iterator[Finding]:
    """What a launch is told, by whom, beside its own words."""
    from kdad_dist.runtime import libraries

    path = libraries.accelerate_file()
    settings = libraries.accelerate_settings()
    if settings is None:
        yield Finding("accelerate", OK, f"no {path}")
    else:
        named = ("distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu")
        said = ", ".join(f"{name}: {settings[name]}" for name in named if name in settings)
        remedy = "launch/train.sh names a file of its own; or use --config_file (docs/cluster.md)"
        found = f"{path} holds for every `accelerate launch` without --config_file ({said})"
        yield Finding("accelerate", NOTE, found, remedy)
    variables = libraries.variables()
    if variables:
        found = " ".join(f"{name}={value}" for name, value in variables.items())
        yield Finding("environment", NOTE, found, "these tell every launch from here what to do")
    zero = os.environ.get("KDAD_MODE", "").startswith("zero")
    there = libraries.deepspeed()
    if there is None:
        remedy = "pip install 'kdad_dist[deepspeed]', for the modes zero1 to zero3"
        yield Finding("DeepSpeed", PROBLEM if zero else NOTE, "not installed", remedy)
        return
    ops = ", ".join(there["compatible"]) or "none"
    built = ", ".join(there["installed"]) or "none"
    found = f"{there['version']}; operators (none is needed): built {built}; can be built {ops}"
    yield Finding("DeepSpeed", OK, found)


def hub(_: Request) -> Iterator[Finding]:
    """Whether pretrained weights can be fetched; one short request."""
    from huggingface_hub import constants

    from kdad_dist.models.weights import hub_trouble

    trouble = hub_trouble(HUB_PATIENCE)
    host = urlsplit(constants.ENDPOINT).hostname  # an address may hold a password
    place = f"weights are kept in {constants.HF_HUB_CACHE}"
    if trouble is None:
        yield Finding("hub", OK, f"{host} answers; {place}")
        return
    remedy = (
        "where there is a network, download the weights that your recipe names, and copy the file "
        "here (once the data is packed, `kdad train RECIPE --dry-run` says its address, and the "
        "key that takes its path); or try things out without pretraining: "
        "method.teacher.weights=random"
    )
    yield Finding("hub", NOTE, f"{host} {trouble}; {place}", remedy)


def wandb(request: Request) -> Iterator[Finding]:
    """W&B: what is asked of it, and whether there is a key, which is not read out."""
    asked = None if request.config is None else request.config.track.wandb
    if importlib.util.find_spec("wandb") is None:
        state = NOTE if asked in (None, "disabled") else PROBLEM
        yield Finding("W&B", state, "not installed", "pip install 'kdad_dist[wandb]'")
        return
    mode = os.environ.get("WANDB_MODE", "not set")
    said = "" if asked is None else f"track.wandb is {asked}; "
    key = "a key is there" if has_key() else "no key"
    found = f"{said}WANDB_MODE {mode}; {key}"
    if asked == "online" and not has_key():
        yield Finding("W&B", NOTE, found, "wandb login; without a key the run is kept offline")
    else:
        yield Finding("W&B", OK, found)


def has_key() -> bool:
    """Whether W&B would find a key, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def slurm(_: Request) -> Iterator[Finding]:
    sinfo = shutil.which("sinfo")
    if sinfo is None:
        yield Finding("SLURM", OK, "none on this machine")
        return
    remedy = "ask those who run the cluster; `kdad sweep` works without SLURM too"
    words = [[sinfo, "--version"], [sinfo, "--noheader", "--format=%P %a %D nodes %G"]]
    said = []
    for command in words:
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=SLURM_PATIENCE
            )
        except subprocess.TimeoutExpired:
            yield Finding("SLURM", PROBLEM, "; ".join([*said, "it does not answer"]), remedy)
            return
        if done.returncode:
            why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
            inside = "SLURM_JOB_ID" in os.environ
            yield Finding("SLURM", PROBLEM if inside else NOTE, "; ".join([*said, why]), remedy)
            return
        said.append(", ".join(done.stdout.split("\n")).strip(", "))
    yield Finding("SLURM", OK, "; ".join(said))


def training(request: Request) -> Iterator[Finding]:
    """What `kdad train CONFIG` would refuse at its start, launched as the variables here say."""
    if request.config is None:
        return
    from kdad_dist.runtime.foreseen import foreseen_mode, foreseen_processes
    from kdad_dist.train.dry_run import dry_run
    from kdad_dist.wording import amount, readable

    processes, mode = request.processes or foreseen_processes(), foreseen_mode(request.config)
    facts = dry_run(request.config, processes, mode)
    images = facts["data"]["training_images"]
    size = facts["checkpoint"]["bytes"]
    number = amount(processes, "process", "processes")
    found = f"{request.config.name} can start on {number}, mode {mode}"
    found += f": {images} images, checkpoints of {readable(size)}"
    yield Finding("training", OK, found)
