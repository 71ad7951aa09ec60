"""One process among the processes of a launch: its device, its rank, its way of talking."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import MixedPrecisionPolicy

from kdad_dist.data.plan import seeds
from kdad_dist.errors import ConfigError, KdadError, PeerLost
from kdad_dist.runtime import launch, zero_config
from kdad_dist.runtime.together import lost_peer
from kdad_dist.runtime.watch import Watch, minutes, open_store
from kdad_dist.wording import amount

log = logging.getLogger(__name__)
MEETING = timedelta(minutes=10)
"""How long the processes of a launch wait for each other at least, until all have come."""
GRACE = 2.0
"""Seconds that a process outlives the one it lost: a launcher takes the exit code of the first."""
FAREWELL = 0.1
"""Seconds."""
LEAVES = "kdad_dist/main leaves"
LAST_NOTES = timedelta(seconds=90)
"""For which the others wait for that: longer than trackers are waited for."""


@dataclass(frozen=True)
class Session:
    accelerator: Accelerator
    rank: int
    world: int
    local_world: int
    """Processes on this node."""
    device: torch.device
    mode: str = "ddp"
    """How the processes train together: ddp (with one process too), fsdp2, zero1, zero2, zero3."""
    precision: str = "no"
    watch: Watch | None = None
    """None: there is nobody else to wait for."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def at(self, order: int, place: str) -> None:
        """Says that this process has come further, lest the launch be given up.

        Args:
            order: how far; the same work has the same number on all processes.
            place: the same in words.
        """
        if self.watch is not None:
            self.watch.at(order, place)

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes in the precision of the session what follows."""
        if self.mode.startswith("zero"):  # accelerate leaves precision to DeepSpeed
            return torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16")
        return self.accelerator.autocast()

    def reseed(self, seed: int, step: int) -> None:
        """Makes torch's own generators a function of (seed, step, process), for the backbones that
        drop whole branches by themselves (Swin), and must do so again after a resume.

        Of the host and of this process's device alone: `torch.manual_seed` costs 0.1 ms.
        """
        number = int(seeds(np.array([self.rank]), seed, step)[0])
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


@contextmanager
def start(
    precision: str = "no",
    timeout_minutes: float = 30.0,
    trains: bool = False,
    stuck: Callable[[str], None] = lambda problem: None,
) -> Iterator[Session]:
    """Joins the processes of the launch, and leaves them in order at the end.

    Args:
        timeout_minutes: for which no process comes any further when the launch is given up.
        stuck: notes the reason for that.
        trains: whether a student will be trained, in the mode that the launcher asks for. Where
            none is, each process works for itself, whatever the mode.

    Raises:
        UsageError: the launcher started something else than it was asked for.
        ConfigError: the precision does not exist on this device.
        PeerLost: another process ended.
    """
    seconds = 60 * timeout_minutes
    session = join(precision, trains, max(MEETING, timedelta(seconds=2 * seconds)))
    watch = store = None
    if session.world > 1:
        store = open_store(timedelta(seconds=seconds))
        watch = Watch(session.rank, session.world, store, seconds, stuck)
        session = replace(session, watch=watch)
    try:
        yield session
        # Not after an error: the other processes may never come to this barrier.
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
            # gloo's threads let go of their last tensors a moment later; where Python had come to
            # its end by then, they would abort the process (seen under DeepSpeed).
            time.sleep(FAREWELL)
    except KdadError as error:
        if error.of_all and store is not None:
            leave_after_main(session, store)
        raise
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        time.sleep(GRACE)
        other = f"process {1 - session.rank} of 2" if session.world == 2 else "another one"
        who = " and ".join(watch.ended() if watch else []) or other
        raise PeerLost(
            f"process {session.rank} of {session.world} lost {who}, which ended or did not answer "
            f"for {minutes(2 * seconds)}",
            "see what that one said, or whether the system killed it (out of memory?)",
        ) from None
    finally:
        if watch is not None:
            watch.stop()
        # accelerate keeps its state for the life of the process; the next session, of another
        # precision perhaps, must begin afresh.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def leave_after_main(here: Session, store: Store) -> None:
    """Waits until the main process has noted what it had to: a launcher ends it with the first."""
    with suppress(RuntimeError):  # it has ended
        if here.is_main:
            store.set(LEAVES, "")
        else:
            store.wait([LEAVES], LAST_NOTES)


def join(precision: str, trains: bool, patience: timedelta) -> Session:
    """The session of this process, once it is clear that the launch is what was asked for."""
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    launch.check_device(on_cpu)
    if on_cpu and precision == "fp16":
        raise ConfigError(
            "precision is fp16, which needs a GPU, and this process runs on the CPU",
            "use bf16 or no",
        )
    if not trains:
        for name in launch.ENGINES:
            os.environ.pop(name, None)
    mode = launch.asked_mode(os.environ)
    # DDP broadcasts no buffers: BatchNorm statistics are global already. It searches for unused
    # parameters because it then never regroups its buckets after the first step, which would sum
    # in another order after a resume (measured on three and more processes).
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    settings = None
    if mode == "zero":
        settings = zero_config.plugin(on_cpu)
        mode = f"zero{settings.zero_stage}"
    if mode == "fsdp2" and on_cpu:
        # On a CPU accelerate would train under DDP in silence: it looks for FSDP only where it
        # believes in several GPUs. What follows is the same code as on these.
        PartialState(cpu=True, timeout=patience).distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=on_cpu and mode == "ddp",
        # DeepSpeed would take it for the precision of the weights.
        mixed_precision="no" if settings else precision,
        deepspeed_plugin=settings,
        kwargs_handlers=[
            wrapping,
            InitProcessGroupKwargs("gloo" if settings and on_cpu else None, timeout=patience),
        ],
    )
    if mode == "fsdp2":
        settle_fsdp(accelerator)
    session = Session(
        accelerator,
        accelerator.process_index,
        accelerator.num_processes,
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        accelerator.device,
        mode,
        precision,
    )
    if not session.is_main:
        logging.getLogger("kdad_dist").setLevel(logging.ERROR)
    launch.check(session.world, accelerator.distributed_type.value)
    shared_by = "" if mode == "ddp" and session.world == 1 else f", mode {mode}"  # by nobody
    log.info(
        "%s%s, device %s, precision %s",
        amount(session.world, "process", "processes"),
        shared_by,
        session.device,
        precision,
    )
    return session


def settle_fsdp(accelerator: Accelerator) -> None:
    """Has FSDP2 do as every other mode does, whatever the launcher's settings say: it neither casts
    weights nor sums gradients in a low precision, and each process brings its own weights.
    """
    sharding = accelerator.state.fsdp_plugin
    assert sharding is not None
    sharding.mixed_precision_policy = MixedPrecisionPolicy()
    sharding.cpu_ram_efficient_loading = False


def free_cores(session: Session) -> int:
    """The CPU cores of the node that fall to this process."""
    return max(1, len(os.sched_getaffinity(0)) // session.local_world)
