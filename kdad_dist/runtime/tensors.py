"""The tensors of a student and its optimizer, to and from the files of one checkpoint directory.

The format is that of torch.distributed.checkpoint (DCP): independent of the number of processes,
and of DDP or FSDP. Nothing but tensors is written, so that nothing else needs to be deserialised:
hyper-parameters follow from the configuration and the step. DCP's own index, `.metadata`, is a
pickle; it is read by an unpickler that knows a dozen plain classes and no others.
"""

import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from kdad_dist.errors import CheckpointError
from kdad_dist.models.gather import rank_here
from kdad_dist.runtime.manifest import damaged
from kdad_dist.runtime.together import Group, together
from kdad_dist.runtime.zero_files import ZeroFiles

METADATA = ".metadata"
STUDENT = "student."
"""What the names of a student's tensors begin with in a checkpoint."""
Stored = Mapping[str, TensorStorageMetadata]
"""What is said of the tensors of a checkpoint, by their names."""


class Tensors:
    """A student, but for its frozen parameters, and the state of its optimizers, in DCP's format.

    A parameter's state has the same name whichever optimizer it belongs to.

    Args:
        optimizers: each of other parameters; none: what stands there of them is left alone.
    """

    format = "dcp"

    def __init__(self, student: nn.Module, *optimizers: Optimizer) -> None:
        self.student = student
        self.optimizers = optimizers

    def snapshot(self) -> "Collected":
        return Collected({k: v.detach().to("cpu", copy=True) for k, v in self.collect().items()})

    def write(self, folder: Path, group: Group) -> list[Path]:
        return Collected(self.collect()).write(folder, group)

    def check(self, folder: Path, files: Collection[str]) -> None:
        """Compares names, shapes and kinds of number; reads no tensor. Not collective."""
        stored, _ = open_checkpoint(folder, files)
        fitting(folder, _student_tensors(self.student), _frozen(self.student), stored)

    def read(self, folder: Path, files: Collection[str]) -> None:
        """The optimizers keep their own hyper-parameters."""
        together("read", folder, lambda: self.fill(folder, files))

    def fill(self, folder: Path, files: Collection[str]) -> None:
        """As `read`, by this process alone."""
        stored, reader = open_checkpoint(folder, files)
        tensors, frozen = _student_tensors(self.student), _frozen(self.student)
        targets = fitting(folder, tensors, frozen, stored)
        moments = _empty_moments(folder, self.student, stored) if self.optimizers else {}
        for name, state in moments.items():
            targets |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        read_into(targets, reader)
        for optimizer in self.optimizers:
            _set_moments(self.student, optimizer, moments)

    def collect(self) -> dict[str, Tensor]:
        """All tensors by their names in a checkpoint, sharing memory with the student."""
        tensors = _student_tensors(self.student)
        for name in _frozen(self.student):
            tensors.pop(name, None)
        state = {k: v for optimizer in self.optimizers for k, v in optimizer.state.items()}
        for name, parameter in bare(self.student).named_parameters():
            for key, value in state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"the optimizer's {key} is no tensor"
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors


@dataclass(frozen=True)
class Collected:
    """Tensors on their way into a checkpoint."""

    tensors: dict[str, Tensor]

    def write(self, folder: Path, group: Group) -> list[Path]:
        """The replicas of DDP are written once, each process writing a part."""
        with warnings.catch_warnings():
            _ignore_single_process()
            save(self.tensors, storage_writer=_Writer(folder), process_group=group)
        written = sorted(folder.glob(f"__{rank_here()}_*"))
        return [*written, folder / METADATA] if rank_here() == 0 else written


def bare(student: nn.Module) -> nn.Module:
    """The student without the wrappers of DDP and of torch.compile."""
    while True:
        if isinstance(student, nn.parallel.DistributedDataParallel):
            student = student.module
        elif isinstance(wrapped := getattr(student, "_orig_mod", None), nn.Module):
            student = wrapped
        else:
            return student


def _student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, sharing memory with the student, by their names in a checkpoint."""
    tensors = bare(student).state_dict()
    assert all(isinstance(value, Tensor) for value in tensors.values()), "a student holds tensors"
    return {f"{STUDENT}{name}": value for name, value in tensors.items()}


def _frozen(student: nn.Module) -> set[str]:
    parameters = bare(student).named_parameters(remove_duplicate=False)
    return {f"{STUDENT}{name}" for name, value in parameters if not value.requires_grad}


def open_checkpoint(path: Path, files: Collection[str]) -> tuple[Stored, StorageReader]:
    """What stands in the verified files of a checkpoint of any mode, and who reads it.

    Raises:
        CheckpointError: they are not what they claim to be.
    """
    if METADATA not in files:
        reader = ZeroFiles(path, files)
        return reader.stored, reader
    metadata = _read_metadata(path, files)
    return metadata.state_dict_metadata, _Reader(path, metadata)  # pyright: ignore


def read_into(targets: dict[str, Tensor], reader: StorageReader) -> None:
    """Fills tensors, whole or sharded, by their names in a checkpoint. Not collective."""
    with warnings.catch_warnings():
        _ignore_single_process()
        load(targets, storage_reader=reader, no_dist=True)


def fitting(
    path: Path, tensors: dict[str, Tensor], frozen: set[str], stored: Stored
) -> dict[str, Tensor]:
    """The student's tensors that a checkpoint holds, once it is clear that all of them fit."""
    there = {name for name in stored if name.startswith(STUDENT)}
    targets = {name: tensors[name] for name in sorted(there & tensors.keys())}
    faults = []
    for name, tensor in targets.items():
        found = (tuple(stored[name].size), stored[name].properties.dtype)
        if found != (tuple(tensor.shape), tensor.dtype):
            faults.append(f"{name} is {found}, not {(tuple(tensor.shape), tensor.dtype)}")
    faults += [f"{name} is missing" for name in sorted(tensors.keys() - there - frozen)]
    faults += [f"{name} is not in this student" for name in sorted(there - tensors.keys())]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit this student: {'; '.join(faults[:5])}{more}",
            "use the configuration that it was trained with (config.yaml of its run)",
        )
    return targets


def _empty_moments(path: Path, student: nn.Module, stored: Stored) -> dict[str, dict[str, Tensor]]:
    """Uninitialised optimizer state of each parameter, of the stored kinds, to be filled."""
    parameters = dict(bare(student).named_parameters())
    moments: dict[str, dict[str, Tensor]] = {}
    for entry in stored:
        if not entry.startswith("optimizer."):
            continue
        name, _, key = entry.removeprefix("optimizer.").rpartition(".")
        if name not in parameters:
            raise CheckpointError(
                f"{path} has optimizer state of {name}, which this student does not have",
                "use the configuration that it was trained with (config.yaml of its run)",
            )
        like, size, dtype = parameters[name], stored[entry].size, stored[entry].properties.dtype
        if size == like.shape and size:  # sharded where the parameter is
            moments.setdefault(name, {})[key] = torch.empty_like(like.detach(), dtype=dtype)
        else:
            moments.setdefault(name, {})[key] = torch.empty(size, dtype=dtype)
    return moments


def _set_moments(
    student: nn.Module, optimizer: Optimizer, moments: dict[str, dict[str, Tensor]]
) -> None:
    """Gives an optimizer its state, in the form that its own `load_state_dict` takes."""
    names = {parameter: name for name, parameter in bare(student).named_parameters()}
    packed = optimizer.state_dict()
    packed["state"] = {
        index: moments[names[parameter]]
        for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True)
        for parameter, index in zip(group["params"], packed_group["params"], strict=True)
        if names.get(parameter) in moments
    }
    optimizer.load_state_dict(packed)


class _Writer(FileSystemWriter):
    """Leaves out the path and the random number that would make equal checkpoints differ."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # Only this exception, not what led to it, travels to the other processes.
        with disk_errors():
            return super().write_data(plan, planner)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raises the OSError of a full disk, which torch.save hides behind "unexpected pos"."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from error


class _Reader(FileSystemReader):
    """Reads the tensors that an index, read with care beforehand, speaks of."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *((f"{_DCP}metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", str(d).removeprefix("torch.")) for d in vars(torch).values()
      if isinstance(d, torch.dtype)),
}  # fmt: skip


def _encoding(kind: type, name: str) -> _MEM_FORMAT_ENCODING:
    """Stands for `getattr`, by which Python before 3.11.4 writes the members of an enumeration."""
    if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}")
    return _MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _encoding
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path, files: Collection[str]) -> Metadata:
    """DCP's index, which may speak of tensors in the named files and of nothing else."""
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise damaged(file, f"it is not an index of tensors ({error})") from error
    if not isinstance(metadata, Metadata):
        raise damaged(file, "it is not an index of tensors")
    if not all(isinstance(v, TensorStorageMetadata) for v in metadata.state_dict_metadata.values()):
        raise damaged(file, "it speaks of something else than tensors")
    for info in (metadata.storage_data or {}).values():
        if info.relative_path not in files or info.transform_descriptors:
            raise damaged(
                file, f"it points to {info.relative_path!r}, which is not of this checkpoint"
            )
    return metadata


def _ignore_single_process() -> None:
    """Silences DCP's warning that it works alone: reading always does, and one process may."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
