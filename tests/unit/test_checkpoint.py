"""Checkpoints of one process: whole or absent, verified before use, pruned, and bit for bit."""

import json
import logging
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.optim import SGD, Adam, AdamW, Optimizer

from kdad_dist.config.methods import LoraConfig, LoraMaeConfig
from kdad_dist.errors import CheckpointError
from kdad_dist.models.mae_build import build_mae
from kdad_dist.runtime import manifest as manifests
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.tensors import Tensors
from tests.launcher import start

IDENTITY = {"config": "c1", "data": "d1"}
FILES = ["manifest.json", ".metadata", "__0_0.distcp"]


def make(kind: str = "sgd", seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 2, 1))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    p = net.parameters()
    optimizers = {
        "sgd": lambda: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "sgd_fused": lambda: SGD(p, lr=0.1, momentum=0.9, fused=True),
        "sgd_plain": lambda: SGD(p, lr=0.1),
        "adam": lambda: Adam(p, lr=0.01),
        "adam_fused": lambda: Adam(p, lr=0.01, fused=True),
        "adamw_amsgrad": lambda: AdamW(p, lr=0.01, amsgrad=True),
    }
    return net, optimizers[kind]()


def train(net: nn.Module, optimizer: Optimizer, start: int, stop: int) -> None:
    torch.set_num_threads(1)  # sums of two threads have other last bits
    net.train()
    for step in range(start, stop):
        image = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(image).square().mean().backward()
        optimizer.step()


def contents(net: nn.Module, optimizer: Optimizer) -> dict[str, bytes]:
    """Every bit of the student and of the optimizer's state, by name."""
    found = {name: value.contiguous().numpy().tobytes() for name, value in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{name}.{key}"] = value.detach().contiguous().numpy().tobytes()
    return found


def manager(directory: Path, keep: int = 2) -> CheckpointManager:
    return CheckpointManager(directory, Rotation(keep), IDENTITY)


def save(directory: Path, step: int, loss: float | None = None, keep: int = 2) -> Path:
    net, optimizer = make(seed=step)
    train(net, optimizer, 0, 1)
    metrics = {} if loss is None else {"val_loss": loss}
    return manager(directory, keep).save(
        Tensors(net, optimizer), TrainState(step, step * 2), metrics
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "kind", ["sgd", "sgd_fused", "sgd_plain", "adam", "adam_fused", "adamw_amsgrad"]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, kind: str):
    straight = make(kind)
    train(*straight, 0, 6)
    first = make(kind)
    train(*first, 0, 3)
    path = manager(tmp_path).save(Tensors(*first), TrainState(3, 6), {})
    second = make(kind, seed=99)
    assert manager(tmp_path).load(path, Tensors(*second)) == TrainState(3, 6)
    assert contents(*second) == contents(*first)
    train(*second, 3, 6)
    assert contents(*second) == contents(*straight)


def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path: Path):
    straight, resumed = make(), make(seed=99)
    path = manager(tmp_path).save(Tensors(*make()), TrainState(0, 0), {})
    manager(tmp_path).load(path, Tensors(*resumed))
    assert not resumed[1].state_dict()["state"]
    train(*straight, 0, 3)
    train(*resumed, 0, 3)
    assert contents(*resumed) == contents(*straight)


def test_the_optimizer_keeps_its_own_hyper_parameters(tmp_path: Path):
    path = save(tmp_path, 1)
    net, optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.025
    manager(tmp_path).load(path, Tensors(net, optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_student_can_be_loaded_without_an_optimizer(tmp_path: Path):
    path = save(tmp_path, 4)
    net, _ = make(seed=99)
    manager(tmp_path).load(path, Tensors(net.requires_grad_(False)))
    expected, optimizer = make(seed=4)
    train(expected, optimizer, 0, 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_equal_states_make_equal_bytes(tmp_path: Path):
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    assert names(first) == sorted(FILES)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path):
    body = CheckpointManager.manifest(save(tmp_path, 7, 0.25))
    assert {key: body[key] for key in ("step", "samples_seen", "metrics", "identity")} == {
        "step": 7,
        "samples_seen": 14,
        "metrics": {"val_loss": 0.25},
        "identity": IDENTITY,
    }
    assert sorted(body["files"]) == sorted(set(FILES) - {"manifest.json"})


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(7))
def test_a_flipped_bit_is_detected_before_its_bytes_are_used(
    tmp_path: Path, name: str, seed: int, caplog: pytest.LogCaptureFixture
):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((newer / name).read_bytes())
    rng = random.Random(f"{name}{seed}")
    position = rng.randrange(len(data))
    data[position] ^= 1 << rng.randrange(8)
    (newer / name).write_bytes(data)
    net, optimizer = make(seed=99)
    before = contents(net, optimizer)
    with pytest.raises(CheckpointError) as caught:
        manager(tmp_path).load(newer, Tensors(net, optimizer))
    assert str(newer / name) in str(caught.value)
    assert contents(net, optimizer) == before, position
    with caplog.at_level(logging.WARNING):
        assert manager(tmp_path).latest() == older
    assert str(newer / name) in caplog.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, None])
def test_a_truncated_or_missing_file_is_detected(tmp_path: Path, name: str, kept: float | None):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    if kept is None:
        (newer / name).unlink()
    else:
        os.truncate(newer / name, int(kept * (newer / name).stat().st_size))
    with pytest.raises(CheckpointError, match="delete"):
        manager(tmp_path).load(newer, Tensors(*make()))
    assert manager(tmp_path).latest() == older


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path):
    save(tmp_path, 1).rename(tmp_path / "step_00000005")
    assert manager(tmp_path).latest() is None


def test_a_broken_checkpoint_is_replaced_when_training_reaches_its_step_again(tmp_path: Path):
    older, broken = save(tmp_path, 1), save(tmp_path, 2)
    os.truncate(broken / FILES[2], 100)
    save(tmp_path, 2)
    assert manager(tmp_path).latest() == broken
    assert names(tmp_path) == [older.name, broken.name]


def test_pruning_does_not_count_a_broken_checkpoint_beyond_the_present_step(tmp_path: Path):
    for step in (1, 2, 9):
        save(tmp_path, step, keep=3)
    os.truncate(tmp_path / "step_00000009" / FILES[2], 100)
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000009"]


def resealed(path: Path, **changes: Any) -> None:
    """Lets a manifest vouch for what lies in its directory now."""
    body = json.loads((path / "manifest.json").read_text())
    body["files"] = {name: manifests.file_entry(path / name) for name in body["files"]}
    (path / "manifest.json").write_text(manifests.render(body | changes))


class Hostile:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def test_an_index_that_would_run_code_is_refused_and_the_code_not_run(tmp_path: Path):
    path = save(tmp_path / "run", 1)
    trap = tmp_path / "it_ran"
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(os.mkdir, str(trap))))
    resealed(path)
    with pytest.raises(CheckpointError, match=r"not an index of tensors .*mkdir"):
        manager(tmp_path / "run").load(path, Tensors(*make()))
    assert not trap.exists()
    pickle.loads((path / ".metadata").read_bytes())  # it would have
    assert trap.exists()


def test_an_index_that_was_written_by_python_3_11_0_is_read(tmp_path: Path, monkeypatch):
    by_name = lambda self, _protocol: (getattr, (type(self), self.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    path = save(tmp_path, 1)
    assert b"getattr" in (path / ".metadata").read_bytes()
    manager(tmp_path).load(path, Tensors(*make()))


@pytest.mark.parametrize("of", [(_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__")])
def test_an_index_that_asks_for_any_other_attribute_is_refused(tmp_path: Path, of: tuple[Any, str]):
    path = save(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(getattr, *of)))
    resealed(path)
    with pytest.raises(CheckpointError, match=f"not an index of tensors .*{of[1]}"):
        manager(tmp_path).load(path, Tensors(*make()))


@pytest.mark.parametrize("elsewhere", ["../secret.distcp", "/etc/passwd", "unlisted.distcp"])
def test_an_index_that_points_out_of_its_checkpoint_is_refused(tmp_path: Path, elsewhere: str):
    path = save(tmp_path, 1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = elsewhere
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    resealed(path)
    with pytest.raises(CheckpointError, match="not of this checkpoint"):
        manager(tmp_path).load(path, Tensors(*make()))


@pytest.mark.parametrize("elsewhere", ["../step_00000002/.metadata", "/etc/passwd", ".."])
def test_a_manifest_that_points_out_of_its_directory_is_refused(tmp_path: Path, elsewhere: str):
    path = save(tmp_path, 1)
    resealed(path, files={elsewhere: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match="outside of its directory"):
        manager(tmp_path).load(path, Tensors(*make()))


def test_a_manifest_of_another_version_is_refused(tmp_path: Path):
    path = save(tmp_path, 1)
    resealed(path, version=2)
    with pytest.raises(CheckpointError, match="version 2; this program reads version 1"):
        manager(tmp_path).load(path, Tensors(*make()))


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw_amsgrad"])
def test_nothing_but_tensors_is_stored(tmp_path: Path, kind: str):
    made = make(kind)
    train(*made, 0, 1)
    path = manager(tmp_path).save(Tensors(*made), TrainState(1, 1), {})
    stored = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    assert stored
    assert not any(isinstance(entry, BytesStorageMetadata) for entry in stored.values())
    assert all(isinstance(entry, TensorStorageMetadata) for entry in stored.values())
    assert str(tmp_path).encode() not in (path / ".metadata").read_bytes()


# ---- what fits -----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(tmp_path: Path):
    path = save(tmp_path, 1)
    other = CheckpointManager(tmp_path, Rotation(2), {"config": "c1", "data": "d2", "teacher": "t"})
    with pytest.raises(CheckpointError) as caught:
        other.load(path, Tensors(*make()))
    assert "data (d1 there, d2 here)" in str(caught.value)
    assert "teacher (None there, t here)" in str(caught.value)
    assert "config" not in caught.value.problem
    with pytest.raises(CheckpointError, match="another run"):
        other.save(Tensors(*make()), TrainState(1, 2), {})


def test_frozen_parameters_are_neither_written_nor_required(tmp_path: Path):
    net, optimizer = make()
    net[0].requires_grad_(False)  # type: ignore[index]
    train(net, optimizer, 0, 1)
    path = manager(tmp_path).save(Tensors(net, optimizer), TrainState(1, 1), {})
    stored = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    assert not any(name.startswith("student.0.") for name in stored)
    assert "student.1.running_mean" in stored
    other, other_optimizer = make(seed=99)
    other[0].requires_grad_(False)  # type: ignore[index]
    own = other[0].weight.clone()  # type: ignore[index]
    manager(tmp_path).load(path, Tensors(other, other_optimizer))
    assert torch.equal(other[0].weight, own)  # type: ignore[index]
    assert torch.equal(other[3].weight, net[3].weight)  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"student.0.bias is missing; student.0.weight is mi"):
        manager(tmp_path).load(path, Tensors(*make()))


def adapted(rank: int = 4, seed: int = 0) -> tuple[nn.Module, Optimizer]:
    """A frozen network of 2 MiB with an update of low rank to train, and a table in a buffer."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).requires_grad_(False)
    net = nn.Sequential(base, nn.Linear(512, rank, bias=False), nn.Linear(rank, 512, bias=False))
    net.register_buffer("table", torch.rand(512, 512), persistent=False)
    optimizer = AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    net(torch.ones(1, 512)).square().sum().backward()
    optimizer.step()
    return net, optimizer


def test_a_checkpoint_of_an_adapted_network_is_a_small_part_of_its_training_state(tmp_path: Path):
    net, optimizer = adapted()
    path = manager(tmp_path).save(Tensors(net, optimizer), TrainState(1, 1), {})
    everything = 3 * sum(p.numel() * p.element_size() for p in net.parameters())
    assert sum(file.stat().st_size for file in path.iterdir()) < 0.05 * everything
    other, other_optimizer = adapted()
    with torch.no_grad():
        other[1].weight.zero_()  # type: ignore[index]
    manager(tmp_path).load(path, Tensors(other, other_optimizer))
    assert contents(other, other_optimizer) == contents(net, optimizer)


def test_an_exchanged_base_is_refused_with_what_it_is_made_of(tmp_path: Path):
    made = adapted()
    path = CheckpointManager(tmp_path, Rotation(1), {"base": "b1"}).save(
        Tensors(*made), TrainState(1, 1), {}
    )
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(tmp_path, Rotation(1), {"base": "b2"}).load(path, Tensors(*adapted()))
    assert "base (b1 there, b2 here)" in caught.value.problem
    assert "base is the student's weights that are not trained, from method.weights" in (
        caught.value.remedy
    )


def test_of_another_rank_the_tensors_are_named_and_not_only_a_hash(tmp_path: Path):
    path = CheckpointManager(tmp_path, Rotation(1), {"base": "b1"}).save(
        Tensors(*adapted()), TrainState(1, 1), {}
    )
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(tmp_path, Rotation(1), {"base": "b2"}).load(
            path, Tensors(*adapted(rank=8))
        )
    assert "student.1.weight is ((4, 512), torch.float32), not ((8, 512)" in caught.value.problem


def test_a_student_that_does_not_fit_is_refused_by_name_and_left_alone(tmp_path: Path):
    path = save(tmp_path, 1)
    other = nn.Sequential(nn.Conv2d(3, 5, 3))
    before = other[0].weight.clone()
    with pytest.raises(CheckpointError) as caught:
        manager(tmp_path).load(path, Tensors(other))
    assert "student.0.weight is ((4, 3, 3, 3), torch.float32), not ((5," in str(caught.value)
    assert "student.1.bias is not in this student" in str(caught.value)
    assert torch.equal(other[0].weight, before)


# ---- latest, best, pruning -----------------------------------------------------------------------


def test_without_checkpoints_there_is_no_latest_and_no_best(tmp_path: Path):
    assert manager(tmp_path / "none").latest() is None
    assert manager(tmp_path / "none").best() is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    for step, loss in enumerate([5.0, 1.0, 3.0, float("nan"), 1.0, 4.0]):
        path = save(tmp_path, step, loss)
    assert names(tmp_path) == ["step_00000001", "step_00000004", "step_00000005"]
    assert manager(tmp_path).latest() == path
    assert manager(tmp_path).best() == tmp_path / "step_00000001"


def test_what_a_person_put_beside_the_checkpoints_is_neither_used_nor_pruned(tmp_path: Path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "step_00000001.mine")
    for step in (2, 3, 4):
        path = save(tmp_path, step)
    assert names(tmp_path) == ["step_00000001.mine", "step_00000003", "step_00000004"]
    assert manager(tmp_path).latest() == path


def test_a_broken_best_gives_way_to_the_second_best(tmp_path: Path):
    best, second = save(tmp_path, 1, 1.0, keep=3), save(tmp_path, 2, 2.0, keep=3)
    save(tmp_path, 3, keep=3)
    os.truncate(best / FILES[2], 100)
    assert manager(tmp_path).best() == second


def test_saving_a_step_again_adds_its_metrics_and_writes_no_tensor(tmp_path: Path):
    path = save(tmp_path, 1)
    data = path / FILES[2]
    written = data.stat().st_mtime_ns
    assert save(tmp_path, 1, 0.5) == save(tmp_path, 1) == path
    assert CheckpointManager.manifest(path)["metrics"] == {"val_loss": 0.5}
    assert data.stat().st_mtime_ns == written
    assert manager(tmp_path).best() == path


def test_leftovers_of_a_kill_are_ignored_and_removed_by_the_next_save(tmp_path: Path):
    path = save(tmp_path, 1)
    for leftover in (".step_00000002.0a1b2c3d.partial", ".step_00000000.0a1b2c3d.partial"):
        shutil.copytree(path, tmp_path / leftover)
    reader = manager(tmp_path)
    assert reader.latest() == path
    assert len(names(tmp_path)) == 3  # a reader deletes nothing: a trainer may be at work
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_deletion_killed_half_way_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda partial: (partial / ".metadata").unlink())
    manifests.delete(path)
    assert manager(tmp_path).latest() is None
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []


# ---- the disk ------------------------------------------------------------------------------------


def test_a_directory_that_may_not_be_written_to_is_named(tmp_path: Path, as_unprivileged: None):
    directory = Path(f"/tmp/kdad-test-{os.getpid()}")
    directory.mkdir()
    try:
        kept = save(directory, 1)
        directory.chmod(0o555)
        with pytest.raises(CheckpointError) as caught:
            save(directory, 2)
        assert "rank 0: PermissionError" in str(caught.value)
        assert str(directory) in str(caught.value)
        assert "allow this user to write there" in caught.value.remedy
        assert manager(directory).latest() == kept
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


def test_a_full_disk_is_called_that_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = Tensors.write

    def onto_a_full_disk(self: Tensors, folder: Path, group: None) -> list[Path]:
        (folder / "__0_0.distcp").symlink_to("/dev/full")
        return write(self, folder, group)

    kept = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Tensors, "write", onto_a_full_disk)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2)
    assert "rank 0: OSError: [Errno 28] No space left on device" in str(caught.value)
    assert "free some space" in caught.value.remedy
    assert names(tmp_path) == [kept.name]
    assert manager(tmp_path).latest() == kept


def save_without_end(directory: Path) -> None:
    made = make()
    latest = manager(directory).latest()
    step = manager(directory).load(latest, Tensors(*made)).step if latest else 0
    while True:
        train(*made, step, step + 1)
        step += 1
        manager(directory).save(Tensors(*made), TrainState(step, step), {"val_loss": 1 / step})


def test_killed_at_any_moment_there_is_always_a_sound_checkpoint(tmp_path: Path):
    rng = random.Random(3)
    reached = []
    for _ in range(6):
        saver = start(save_without_end, tmp_path)
        known = manager(tmp_path).latest()
        while manager(tmp_path).latest() == known:  # it has begun to save
            time.sleep(0.01)
            assert saver.is_alive()
        time.sleep(rng.uniform(0, 0.1))
        saver.kill()
        saver.join()
        for path in tmp_path.glob("step_*"):
            manifests.verify(path)
        latest = manager(tmp_path).latest()
        assert latest is not None
        reached.append(manager(tmp_path).load(latest, Tensors(*make(seed=99))).step)
    assert reached == sorted(set(reached))
    straight = make()
    train(*straight, 0, reached[-1])
    resumed = make(seed=99)
    manager(tmp_path).load(tmp_path / f"step_{reached[-1]:08d}", Tensors(*resumed))
    assert contents(*resumed) == contents(*straight)


def test_young_checkpoints_stay_however_many_they_are(tmp_path: Path):
    def steps(hours: float, step: int) -> list[str]:
        made = make()
        rotation = Rotation(1, hours)
        CheckpointManager(tmp_path, rotation, {}).save(Tensors(*made), TrainState(step, step), {})
        return names(tmp_path)

    for step in (1, 2, 3):
        found = steps(2, step)
    assert found == ["step_00000001", "step_00000002", "step_00000003"]
    long_ago = time.time() - 3 * 3600
    os.utime(tmp_path / "step_00000001", (long_ago, long_ago))
    assert steps(2, 4) == ["step_00000002", "step_00000003", "step_00000004"]
    assert steps(0, 5) == ["step_00000005"]


def test_what_lora_leaves_frozen_is_not_written(tmp_path: Path):
    def size(lora: LoraConfig | None) -> int:
        config = LoraMaeConfig(
            preset="mae_vit_small_patch7",
            weights="random",
            lora=lora,
            freeze_non_lora=lora is not None,
            freeze_random=lora is not None,
        )
        net = build_mae(config, image_size=28, seed=0)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        manager = CheckpointManager(tmp_path / repr(lora), Rotation(1), {})
        path = manager.save(Tensors(net, optimizer), TrainState(1, 1), {})
        return sum(entry["bytes"] for entry in manager.manifest(path)["files"].values())

    adapted, full = size(LoraConfig()), size(None)
    assert full > 3 * 4 * 11e6
    assert adapted < 0.05 * full


def test_a_clock_that_was_set_back_deletes_nothing_young_and_keeps_nothing_without_being_asked(
    tmp_path: Path,
):
    paths = [tmp_path / f"step_{i}" for i in range(4)]
    for path in paths:
        path.mkdir()
    for path in paths[:2]:
        os.utime(path, (time.time() + 9000, time.time() + 9000))
    os.utime(paths[2], (0, 0))
    assert Rotation(1).keeps(paths) == {paths[3]}
    assert Rotation(1, hours=1).keeps(paths) == {*paths[:2], paths[3]}
