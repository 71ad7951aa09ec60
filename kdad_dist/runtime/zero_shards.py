"""What the processes hold of a student under DeepSpeed's ZeRO, to and from checkpoints."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils._pytree import tree_map_only

from kdad_dist.files import sync_directory
from kdad_dist.models.gather import processes, rank_here
from kdad_dist.runtime.tensors import disk_errors, fitting, open_checkpoint, read_into
from kdad_dist.runtime.together import Group, together
from kdad_dist.runtime.zero_files import FOLDER, entry, pieces

STEP = "step"
"""Adam's counter, the one part of an optimizer's state that is not as large as its parameter."""


@dataclass(frozen=True)
class Shards:
    """A student, but for its frozen parameters, and the state of its optimizer, each process
    writing the part that it holds in DeepSpeed's own format.
    """

    engine: DeepSpeedEngine
    format = "zero"

    def snapshot(self) -> "Files":
        return Files(tree_map_only(Tensor, _on_host, self.collect()))

    def write(self, folder: Path, group: Group) -> list[Path]:
        return Files(self.collect()).write(folder, group)

    def check(self, folder: Path, files: Collection[str]) -> None:
        """Compares names, shapes and kinds of number; reads no tensor. Not collective."""
        tensors = {entry(name): value for name, value in self._student.state_dict().items()}
        parameters = dict(self._student.named_parameters())
        for name, parameter in parameters.items():
            shape, dtype = _shape(parameter), parameter.dtype
            tensors[entry(name)] = torch.empty(shape, dtype=dtype, device="meta")
        frozen = {entry(name) for name, p in parameters.items() if not p.requires_grad}
        fitting(folder, tensors, frozen, open_checkpoint(folder, files)[0])

    def read(self, folder: Path, files: Collection[str]) -> None:
        """Takes everything from files of any mode, stage and number of processes. Collective.

        The optimizer keeps its own hyper-parameters.
        """
        zero = self._zero
        if not self._sharded:
            together("read", folder, lambda: self._fill(folder, files))
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()  # sends off the parameters that every process keeps whole
        together("read", folder, lambda: self._fill(folder, files))
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()

    def collect(self) -> dict[str, dict[str, Any]]:
        """What DeepSpeed wants to write from this process, by the names of its files. Collective.

        It only wants to: a disk that is full in the midst of DeepSpeed's talk between the processes
        would leave the others waiting. The copy of all weights that stages 1 and 2 give to one
        process stays out: the parts of all processes make up the same weights.
        """
        engine, catcher = self.engine, _Catcher()
        own, engine.checkpoint_engine = engine.checkpoint_engine, catcher
        engine._copy_recovery_script = lambda save_path: None  # pyright: ignore
        try:
            engine.save_checkpoint(".", FOLDER, save_latest=False, exclude_frozen_parameters=True)
        finally:
            engine.checkpoint_engine = own
        for body in catcher.caught.values():
            if "module" in body:
                body["module"] = {name: body["module"][name] for name in body["buffer_names"]}
        return catcher.caught

    @property
    def _student(self) -> nn.Module:
        return cast(nn.Module, self.engine.module)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which holds torch's own."""
        return self.engine.optimizer

    @property
    def _sharded(self) -> bool:
        """Stage 3: parameters are divided too, each by itself."""
        return self.engine.zero_optimization_stage() == 3

    def _groups(self) -> Iterator[tuple[dict[str, torch.Size], Tensor]]:
        """Names and shapes of the parameters of each group, and the flat tensor of this process's
        part of them, which torch's optimizer updates.
        """
        zero = self._zero
        groups = zero.fp16_groups if self._sharded else zero.round_robin_bit16_groups
        flats = (
            zero.fp32_partitioned_groups_flat
            if self._sharded
            else zero.single_partition_of_fp32_groups
        )
        for parameters, flat in zip(groups, flats, strict=True):
            yield {self.engine.param_names[p]: _shape(p) for p in parameters}, flat

    @torch.no_grad()
    def _fill(self, folder: Path, files: Collection[str]) -> None:
        """Fills buffers, and this process's part of weights and moments; one parameter at a time
        is whole in memory.
        """
        stored, reader = open_checkpoint(folder, files)
        buffers = {entry(name): buffer for name, buffer in self._student.named_buffers()}
        read_into({name: buffers[name] for name in buffers.keys() & stored.keys()}, reader)
        rank, world = rank_here(), processes()
        for shapes, flat in self._groups():
            length = None if self._sharded else len(flat)
            where = {piece.name: piece for piece in pieces(shapes, rank, world, length)}
            state: dict[str, Tensor] = {}
            for name in shapes:
                start = entry(name, "*")[:-1]
                kinds = ["", *(key.removeprefix(start) for key in stored if key.startswith(start))]
                whole = {entry(name, kind): _empty(stored[entry(name, kind)]) for kind in kinds}
                read_into(whole, reader)
                for kind in kinds:
                    value = whole[entry(name, kind)]
                    if kind == STEP:
                        state[STEP] = value.to(flat.device)
                        continue
                    if kind and kind not in state:
                        state[kind] = torch.zeros_like(flat)
                    if name in where:
                        where[name].copy(value, state[kind] if kind else flat)
            self._zero.optimizer.state[flat] = state


@dataclass(frozen=True)
class Files:
    """What DeepSpeed writes from this process, by the names of its files."""

    bodies: dict[str, dict[str, Any]]

    def write(self, folder: Path, group: Group) -> list[Path]:
        own = folder / FOLDER
        own.mkdir(exist_ok=True)
        for name, body in self.bodies.items():
            with disk_errors(), (own / name).open("wb") as stream:
                torch.save(body, stream)
                stream.flush()
                os.fsync(stream.fileno())
        sync_directory(own)
        return [own / name for name in self.bodies]


class _Catcher(TorchCheckpointEngine):
    """Keeps what DeepSpeed would write, and touches no disk."""

    def __init__(self) -> None:
        self.caught: dict[str, dict[str, Any]] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing."""

    def create(self, info: object) -> None:
        """Nothing."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self.caught[Path(path).name] = state_dict


def _empty(described: TensorStorageMetadata) -> Tensor:
    return torch.empty(described.size, dtype=described.properties.dtype)


def _shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter, wherever it is."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _on_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
