"""Cached teacher features: the same bits as computed, computed once."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kdad_dist.data.targets import TargetCache, fill_targets
from kdad_dist.types import Features


class Teacher:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.calls: list[int] = []

    def __call__(self, rows: np.ndarray) -> Features:
        self.calls.append(len(rows))
        maps = [
            torch.stack([self.map(int(row), (c, s, s)) for row in rows])
            for c, s in ((4, 6), (8, 3))
        ]
        return tuple(layer.contiguous(memory_format=torch.channels_last) for layer in maps)

    def map(self, row: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(row)).to(self.dtype)


def filled(path: Path, teacher: Teacher) -> TargetCache:
    return fill_targets(path, teacher, 7, 3, "the teacher's features of 7 images")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    teacher = Teacher(dtype)
    targets = filled(tmp_path / "t", teacher)
    assert len(targets) == 7 and teacher.calls == [1, 3, 3, 1]
    rows = np.array([6, 0, 3, 3])
    for read, computed in zip(targets.read(rows), teacher(rows), strict=True):
        assert read.dtype == dtype and torch.equal(read, computed)
        assert read.is_contiguous(memory_format=torch.channels_last)


def test_a_later_run_computes_no_more_than_the_shapes(tmp_path: Path):
    filled(tmp_path / "t", Teacher(torch.float32))
    teacher = Teacher(torch.float32)
    targets = filled(tmp_path / "t", teacher)
    assert teacher.calls == [1]
    assert torch.equal(targets.read(np.array([5]))[1], teacher(np.array([5]))[1])


def test_no_rows_give_empty_maps(tmp_path: Path):
    targets = filled(tmp_path / "t", Teacher(torch.bfloat16))
    assert [layer.shape for layer in targets.read(np.empty(0, np.int64))] == [
        (0, 4, 6, 6),
        (0, 8, 3, 3),
    ]


def test_the_size_is_told_before_anything_is_computed(tmp_path: Path, caplog):
    teacher = Teacher(torch.float32)
    with caplog.at_level(logging.INFO):
        filled(tmp_path / "t", teacher)
    assert "the teacher's features of 7 images: 0.0 MiB" in caplog.text
