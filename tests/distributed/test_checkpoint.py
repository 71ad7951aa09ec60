"""Checkpoints of several processes: written once between them, loaded by any number of others."""

import hashlib
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from kdad_dist.errors import CheckpointError
from kdad_dist.models.norm import convert_batchnorm
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.tensors import Tensors
from tests.launcher import run_ranks


def manager(directory: Path) -> CheckpointManager:
    return CheckpointManager(directory, Rotation(2), {"config": "c"})


def build(kind: str, seed: int = 0) -> tuple[nn.Module, Optimizer]:
    """A student in DDP, in the way that training wraps it."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32), (32, 4)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    net = convert_batchnorm(nn.Sequential(*layers))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = (
        SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        if kind == "sgd"
        else Adam(net.parameters(), lr=0.01, fused=True)
    )
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Small buckets, so that there are several, as there are in a student of full size.
        net = DistributedDataParallel(
            net, broadcast_buffers=False, find_unused_parameters=True, bucket_cap_mb=0.01
        )
    return net, optimizer


def train(net: nn.Module, optimizer: Optimizer, start: int, stop: int) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(start, stop):
        image = torch.randn(7, 3, 12, 12, generator=torch.Generator().manual_seed(step))
        loss = net(image[rank::world]).square().mean((1, 2, 3)).sum() / len(image)
        optimizer.zero_grad()
        (loss * world).backward()
        optimizer.step()


def digest(net: nn.Module, optimizer: Optimizer) -> str:
    """Of every bit of the student and of the optimizer's state."""
    bare = net.module if isinstance(net, DistributedDataParallel) else net
    found = hashlib.sha256()
    tensors: list[Any] = list(bare.state_dict().values())
    for parameter in bare.parameters():
        tensors += [value for _, value in sorted(optimizer.state[parameter].items())]
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def save(directory: Path, kind: str, steps: int) -> str:
    made = build(kind)
    train(*made, 0, steps)
    manager(directory).save(Tensors(*made), TrainState(steps, 7 * steps), {})
    return digest(*made)


def load(directories: list[Path], kind: str) -> list[str]:
    digests = []
    for directory in directories:
        made = build(kind, seed=99)
        path = manager(directory).latest()
        assert path is not None
        assert manager(directory).load(path, Tensors(*made)) == TrainState(2, 14)
        digests.append(digest(*made))
    return digests


def test_any_number_of_processes_loads_what_any_number_wrote(tmp_path: Path):
    kind = "adam"
    directories = [tmp_path / str(n) for n in (1, 2, 3, 4)]
    expected = []
    for n, directory in enumerate(directories, 1):
        digests = set(run_ranks(save, n, directory, kind, 2))
        assert len(digests) == 1
        expected.append(digests.pop())
    for m in (1, 2, 3, 4):
        assert run_ranks(load, m, directories, kind) == [expected] * m


def test_replicas_are_written_once_between_the_processes(tmp_path: Path):
    run_ranks(save, 1, tmp_path / "1", "adam", 1)
    run_ranks(save, 3, tmp_path / "3", "adam", 1)
    alone = CheckpointManager.manifest(tmp_path / "1/step_00000001")
    shared = CheckpointManager.manifest(tmp_path / "3/step_00000001")
    assert shared["world_size"] == 3
    assert sorted(shared["files"]) == [".metadata", *(f"__{rank}_0.distcp" for rank in range(3))]
    total = sum(entry["bytes"] for entry in shared["files"].values())
    assert total < 1.1 * sum(entry["bytes"] for entry in alone["files"].values())


def straight(directory: Path, saved: int, stop: int) -> list[str]:
    """Trains to the end without a pause, and leaves a checkpoint on the way, for each optimizer."""
    digests = []
    for kind in ("sgd", "adam"):
        made = build(kind)
        train(*made, 0, saved)
        manager(directory / kind).save(Tensors(*made), TrainState(saved, 7 * saved), {})
        train(*made, saved, stop)
        digests.append(digest(*made))
    return digests


def resumed(directory: Path, stop: int) -> list[str]:
    digests = []
    for kind in ("sgd", "adam"):
        made = build(kind, seed=99)
        path = manager(directory / kind).latest()
        assert path is not None
        train(*made, manager(directory / kind).load(path, Tensors(*made)).step, stop)
        digests.append(digest(*made))
    return digests


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, processes: int):
    expected = run_ranks(straight, processes, tmp_path, 3, 8)
    assert expected == [expected[0]] * processes
    assert run_ranks(resumed, processes, tmp_path, 8) == expected


def latest_of(directories: list[Path]) -> Path | None:
    return manager(directories[dist.get_rank()]).latest()


def test_the_main_process_chooses_for_all(tmp_path: Path):
    save(tmp_path / "a", "sgd", 2)
    save(tmp_path / "b", "sgd", 3)
    chosen = run_ranks(latest_of, 3, [tmp_path / name for name in ("a", "b", "none")])
    assert chosen == [tmp_path / "a/step_00000002"] * 3


def save_where_one_disk_is_full(directory: Path, full: int) -> tuple[str, list[str]]:
    made = build("adam")
    train(*made, 0, 1)
    manager(directory).save(Tensors(*made), TrainState(1, 7), {})
    if dist.get_rank() == full:  # writing more than this fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    train(*made, 1, 2)
    with pytest.raises(CheckpointError) as caught:
        manager(directory).save(Tensors(*made), TrainState(2, 14), {})
    return str(caught.value), sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.starves
def test_the_full_disk_of_one_process_is_the_same_error_for_all(tmp_path: Path, full: int):
    (message, left), *others = run_ranks(save_where_one_disk_is_full, 2, tmp_path, full)
    assert others[0][0] == message
    assert f"step_00000002 cannot be written: rank {full}: " in message
    assert "File too large" in message
    assert "->" in message
    assert left == ["step_00000001"]


def load_with_damage(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        manager(directory).load(directory / "step_00000001", Tensors(*build("sgd")))
    return str(caught.value)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"])
def test_damage_to_any_file_is_the_same_error_for_all(tmp_path: Path, name: str):
    run_ranks(save, 2, tmp_path, "sgd", 1)
    file = tmp_path / "step_00000001" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    first, second = run_ranks(load_with_damage, 2, tmp_path)
    assert first == second
    assert str(file) in first


def to_sharded(directory: Path) -> tuple[bool, str]:
    """Loads a checkpoint of DDP into FSDP, and writes it from there."""
    torch.manual_seed(99)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = Adam(fully_shard(net).parameters(), lr=0.01)
    state = manager(directory).load(directory / "step_00000001", Tensors(net, optimizer))
    manager(directory / "sharded").save(Tensors(net, optimizer), state, {})
    moments = [value for s in optimizer.state.values() for key, value in s.items() if key != "step"]
    return all(isinstance(value, DTensor) for value in moments), repr(len(moments))


def plain(directory: Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = Adam(net.parameters(), lr=0.01)
    for step in range(steps):
        image = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        net(image).square().mean().backward()
        optimizer.step()
    if steps:
        manager(directory).save(Tensors(net, optimizer), TrainState(steps, 5 * steps), {})
    else:
        manager(directory).load(directory / "step_00000001", Tensors(net, optimizer))
    return {"net": net.state_dict(), "state": optimizer.state_dict()["state"]}


def test_a_checkpoint_passes_from_one_process_to_shards_and_back(tmp_path: Path):
    written = plain(tmp_path, 1)
    assert run_ranks(to_sharded, 2, tmp_path) == [(True, "12")] * 2
    torch.testing.assert_close(plain(tmp_path / "sharded", 0), written, rtol=0, atol=0)
