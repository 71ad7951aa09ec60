"""Where the elements of parameters lie in DeepSpeed's flat tensors, and reading them with care."""

import os
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, SupportsIndex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdad_dist.errors import CheckpointError
from kdad_dist.runtime import zero_files
from kdad_dist.runtime.tensors import open_checkpoint, read_into
from kdad_dist.runtime.zero_files import pieces

SHAPES = st.lists(st.lists(st.integers(1, 5), max_size=3).map(torch.Size), min_size=1, max_size=6)
FILES = ["zero/mp_rank_00_model_states.pt"] + [
    f"zero/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)
]


@settings(deadline=None)
@given(shapes=SHAPES, world=st.integers(1, 5), stage3=st.booleans())
def test_the_pieces_of_all_processes_make_up_every_parameter_once(
    shapes: list[torch.Size], world: int, stage3: bool
):
    named = {f"p{i}": shape for i, shape in enumerate(shapes)}
    length = None if stage3 else -(-sum(map(prod, shapes)) // (2 * world)) * 2
    seen = {name: torch.zeros(prod(shape), dtype=torch.int) for name, shape in named.items()}
    for rank in range(world):
        end = 0
        for piece in pieces(named, rank, world, length):
            assert piece.offset >= end
            end = piece.offset + piece.numel
            seen[piece.name][piece.start : piece.start + piece.numel] += 1
        assert length is None or end <= length
    assert all((count == 1).all() for count in seen.values())


def write(path: Path, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint of stage 2 of two processes: 7 elements, in parts of 4 with padding."""
    (path / "zero").mkdir()
    weight, bias = torch.randn(2, 3), torch.randn(1)
    flat = torch.cat([weight.view(-1), bias, torch.zeros(1)])
    shapes = {"weight": weight.shape, "bias": bias.shape}
    model = {
        "buffer_names": ["mean"],
        "module": {"mean": torch.ones(5)},
        "param_shapes": [shapes],
        **changes,
    }
    torch.save(model, path / FILES[0])
    for rank in range(2):
        part = flat[4 * rank :][:4].clone()
        state = {
            "base_optimizer_state": {"state": {0: {"step": torch.tensor(3.0), "m": 2 * part}}},
            "single_partition_of_fp32_groups": [part[:3] if rank else part],
            "group_paddings": [rank],
        }
        torch.save({"optimizer_state_dict": state}, path / FILES[1 + rank])
    names = {"weight": weight, "bias": bias}
    return {f"student.{k}": v for k, v in names.items()} | {
        f"optimizer.{k}.m": 2 * v for k, v in names.items()
    }


def test_parts_of_all_processes_are_put_together(tmp_path: Path):
    expected = write(tmp_path)
    expected |= {"student.mean": torch.ones(5), "optimizer.bias.step": torch.tensor(3.0)}
    stored, reader = open_checkpoint(tmp_path, FILES)
    assert stored.keys() == expected.keys() | {"optimizer.weight.step"}
    found = {name: torch.empty_like(value) for name, value in expected.items()}
    read_into(found, reader)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_missing_process_is_noticed(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(CheckpointError, match=r"elements of (student|optimizer)\."):
        open_checkpoint(tmp_path, FILES[:2])


def test_files_of_something_else_are_no_checkpoint(tmp_path: Path):
    write(tmp_path, param_shapes=[{"weight": torch.Size([2, 3]), "more": torch.Size([9])}])
    with pytest.raises(CheckpointError, match="DeepSpeed"):
        open_checkpoint(tmp_path, FILES)
    with pytest.raises(CheckpointError, match="DeepSpeed"):
        open_checkpoint(tmp_path, [])


class Stage(Enum):
    """Is written as Python before 3.11.4 writes members."""

    gradients = 2

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]:
        return getattr, (Stage, self.name)


def test_files_that_python_3_11_0_wrote_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero_files, "_INERT", [*zero_files._INERT, f"{__name__}.Stage"])
    expected = write(tmp_path, zero_stage=Stage.gradients)
    assert b"getattr" in (tmp_path / FILES[0]).read_bytes()
    stored, _ = open_checkpoint(tmp_path, FILES)
    assert stored.keys() > expected.keys()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-was-done",)


def test_nothing_in_the_files_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ds_version=Harmful())
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path, FILES)
    assert not Path("harm-was-done").exists()


def test_files_and_their_folder_are_on_the_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    from kdad_dist.runtime.zero_shards import Files

    flushed = []
    monkeypatch.setattr(
        "os.fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    [written] = Files({"a.pt": {"value": torch.ones(2)}}).write(tmp_path, None)
    assert flushed == [str(written), str(written.parent)]
