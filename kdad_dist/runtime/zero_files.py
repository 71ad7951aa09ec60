"""The files of a checkpoint that DeepSpeed's ZeRO wrote, read by the names of their tensors.

ZeRO joins the parameters of an optimizer group into one flat tensor and gives every process a part
of it; so do these files. Where a parameter's elements lie follows from its place in the group, the
stage and the number of processes, so that a checkpoint can be read on any number of processes, in
any mode, and on a machine without DeepSpeed. torch's restricted unpickler opens the files: what
it asks of DeepSpeed is replaced by one empty class, everything else that it does not know fails.
"""

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future
from torch.serialization import safe_globals

from kdad_dist.runtime.manifest import damaged

FOLDER = "zero"
"""Of a checkpoint, where DeepSpeed's files lie."""


class _Inert:
    """Stands in the place of a class of DeepSpeed, or of what is asked of one."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_INERT = [
    "builtins.getattr",  # by which Python before 3.11.4 writes the member of an enumeration
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
]


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements in the flat tensor of one process."""

    name: str
    start: int
    """Of the run, in the parameter."""
    numel: int
    offset: int
    """Of the run, in the flat tensor."""

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.numel]

    def copy(self, whole: Tensor, flat: Tensor) -> None:
        """From the whole parameter, or a moment of it, to its run in a flat tensor."""
        self.of(flat).copy_(whole.view(-1)[self.start : self.start + self.numel])


def pieces(
    shapes: Mapping[str, torch.Size], rank: int, world: int, length: int | None
) -> Iterator[Piece]:
    """What the flat tensor of a process holds of a group of parameters.

    Args:
        shapes: in the order of the group.
        length: of the flat tensor, under stages 1 and 2, where all parameters are joined and then
            divided. None: stage 3, where each is divided by itself.
    """
    joined, offset = 0, 0
    for name, shape in shapes.items():
        numel = prod(shape)
        if length is None:
            part = -(-numel // world)
            start, stop = min(rank * part, numel), min((rank + 1) * part, numel)
            at, offset = offset, offset + part
        else:
            first = rank * length - joined
            start, stop = max(0, first), min(numel, first + length)
            at, joined = start - first, joined + numel
        if start < stop:
            yield Piece(name, start, stop - start, at)


class ZeroFiles(StorageReader):
    """Gives torch's distributed checkpoint (DCP) the tensors by its names for them: `student.X`,
    and `optimizer.X.moment` of a parameter `X`.

    Args:
        path: a checkpoint.
        files: its verified files; no other is opened.

    Raises:
        CheckpointError: they are not files of DeepSpeed, or do not belong together.
    """

    def __init__(self, path: Path, files: Collection[str]) -> None:
        self.path = path
        shards = sorted((n for n in files if n.endswith("optim_states.pt")), key=_rank)
        models = sorted((n for n in files if n.endswith("model_states.pt")), key=_rank)
        try:
            self._index([_open(path / name) for name in shards], _open(path / models[0]))
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError) as error:
            problem = f"these are not the files of a training under DeepSpeed ({error!r})"
            raise damaged(path / FOLDER, problem) from error
        self.stored = {name: _described(self.parts[name], s) for name, s in self.shapes.items()}
        """What is said of each tensor."""

    def tensor(self, name: str) -> Tensor:
        """The whole tensor of this name, on the host; in memory only while it is used."""
        parts = [part.detach().view(-1) for part in self.parts[name]]
        return torch.cat(parts).view(self.shapes[name])

    def _index(self, shards: list[dict[str, Any]], model: dict[str, Any]) -> None:
        """Notes which runs of which flat tensors make up each tensor."""
        self.parts: dict[str, list[Tensor]] = {}
        self.shapes: dict[str, torch.Size] = {}
        for name in model["buffer_names"]:
            value = model["module"][name]
            self.parts[entry(name)], self.shapes[entry(name)] = [value], value.shape
        for rank, shard in enumerate(shards):
            for number, shapes in enumerate(model["param_shapes"]):
                flats, length = _group(shard["optimizer_state_dict"], number)
                self._add(shapes, flats, pieces(shapes, rank, len(shards), length))
        for key, shape in self.shapes.items():
            found = sum(part.numel() for part in self.parts[key])
            if found != prod(shape):
                raise LookupError(f"{found} elements of {key}, which has {prod(shape)}")

    def _add(
        self, shapes: Mapping[str, torch.Size], flats: dict[str, Tensor], found: Iterator[Piece]
    ) -> None:
        """What the flat tensors of a process have of a group of parameters."""
        for name, shape in shapes.items():
            for kind, flat in flats.items():
                key, counts = entry(name, kind), flat.ndim == 0  # a counter of steps
                self.shapes[key] = flat.shape if counts else shape
                self.parts[key] = [flat] if counts else self.parts.get(key, [])
        for piece in found:
            for kind, flat in flats.items():
                if flat.ndim:
                    self.parts[entry(piece.name, kind)].append(piece.of(flat))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({**self.stored})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            whole = self.tensor(item.storage_index.fqn)
            target = planner.resolve_tensor(item).detach()
            target.copy_(narrow_tensor_by_index(whole, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader reads one checkpoint."""

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: all is known since the files were opened."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def entry(name: str, kind: str = "") -> str:
    """The name in a checkpoint of a tensor of the student, or of a moment of it of some kind."""
    return f"optimizer.{name}.{kind}" if kind else f"student.{name}"


def _group(state: dict[str, Any], number: int) -> tuple[dict[str, Tensor], int | None]:
    """The flat tensors of a group in one file, by kind, and their length, padding included; the
    weights themselves are of the kind "". Of stage 3, no length: see `pieces`.
    """
    if "fp32_flat_groups" in state:
        flat, optimizer = state["fp32_flat_groups"][number], state["optimizer_state_dict"]
        length = None
    else:
        flat, optimizer = (
            state["single_partition_of_fp32_groups"][number],
            state["base_optimizer_state"],
        )
        length = len(flat) + state["group_paddings"][number]
    return {"": flat, **optimizer["state"].get(number, {})}, length


def _rank(name: str) -> int:
    """Of the process that wrote a file; DeepSpeed does not number the only one of its kind."""
    found = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(found[1]) if found else 0


def _open(file: Path) -> dict[str, Any]:
    with safe_globals([(_Inert, name) for name in _INERT]):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _described(parts: list[Tensor], shape: torch.Size) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
    return TensorStorageMetadata(TensorProperties(parts[0].dtype), shape, [chunk])
