"""What `kdad doctor` finds on machines that are well, and on those that are not."""

import fcntl
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from kdad_dist.config.load import load
from kdad_dist.doctor import checks
from kdad_dist.doctor import disk as doctor_disk
from kdad_dist.doctor import launch as doctor_launch
from kdad_dist.doctor.checks import NOTE, OK, PROBLEM, Check, Finding, Request, examine
from kdad_dist.doctor.disk import Mount
from kdad_dist.doctor.text import line, refuse_problems
from kdad_dist.errors import DataError, KdadError
from kdad_dist.runtime import libraries
from kdad_dist.runtime.exchange import seconds
from kdad_dist.runtime.foreseen import ASKED, foreseen_mode, foreseen_processes
from tests.launcher import connections, ends
from tests.needs import REPOSITORY
from tests.shards import make_shards

NOTHING = Request(None, [], None)
KEY = "0123456789abcdef" * 2 + "01234567"


def findings(check: Check, request: Request = NOTHING) -> list[Finding]:
    return list(examine(request, [("it", check)]))


def only(check: Check, request: Request = NOTHING) -> Finding:
    [found] = findings(check, request)
    return found


def failing(error: Exception) -> Check:
    def check(_: Request):
        raise error
        yield

    return check


def test_a_check_that_cannot_be_carried_out_has_found_a_problem():
    found = only(failing(ImportError("libcudart.so.12: cannot open shared object file")))
    assert (found.name, found.state) == ("it", PROBLEM)
    assert "libcudart.so.12" in found.found
    found = only(failing(DataError("shards/tile has no index", "pack it")))
    assert (found.found, found.remedy) == ("shards/tile has no index", "pack it")


def test_a_problem_that_stops_two_checks_is_counted_once():
    gone = failing(DataError("shards/tile does not exist", "pack it"))
    found = list(examine(NOTHING, [("shards", gone), ("training", gone)]))
    assert [finding.state for finding in found] == [PROBLEM, NOTE]
    assert "same problem as shards" in found[1].found


def test_problems_decide_the_exit_code_and_notes_do_not():
    good, note, bad = (Finding(state, state, "") for state in (OK, NOTE, PROBLEM))
    refuse_problems([good, note])
    with pytest.raises(KdadError, match="one thing here would break a run: problem") as caught:
        refuse_problems([good, bad, note])
    assert caught.value.exit_code == 1


def test_no_finding_steers_the_terminal():
    said = line(Finding("disk", PROBLEM, "\x1b[2J[bold] is full", "make room in \x1b[2J")).plain
    assert "\x1b" not in said
    assert r"\x1b[2J[bold] is full" in said and r"make room in \x1b[2J" in said


def test_a_disk_that_does_all_is_left_as_it_was(tmp_path):
    found = doctor_disk.disk(tmp_path / "not/there/yet")
    assert found.state in (OK, NOTE), found  # little room is a note
    assert "rename, flush, lock and map work" in found.found
    assert not list(tmp_path.iterdir())


def test_a_directory_that_may_not_be_written_is_a_problem():
    found = doctor_disk.disk(Path("/proc/runs"))  # where nobody may
    assert found.state == PROBLEM
    assert "cannot be written" in found.found
    assert found.remedy and "KDAD_CACHE" in found.remedy


def test_locks_that_keep_nobody_out_or_do_not_exist_are_problems(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    found = doctor_disk.disk(tmp_path)
    assert (found.state, "does not keep another process out" in found.found) == (PROBLEM, True)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    found = doctor_disk.disk(tmp_path)
    assert "flock does not work: Function not implemented" in found.found
    assert found.remedy and "nolock" in found.remedy


@pytest.mark.parametrize(("free", "state"), [(10**12, OK), (5 * 2**30, NOTE), (2**20, PROBLEM)])
def test_room_that_runs_out_is_said_before_it_does(tmp_path, monkeypatch, free, state):
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(doctor_disk.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor_disk, "mount", lambda _: Mount("ext4"))
    assert doctor_disk.disk(tmp_path).state == state


@pytest.mark.parametrize(
    ("mount", "said", "state"),
    [
        (Mount("ext4", "rw,relatime"), "lock and map work", OK),
        (Mount("nfs4", "rw,vers=4.2,local_lock=none"), "other machines see our locks", OK),
        (Mount("nfs", "rw,vers=3,nolock"), "does not see our locks (nolock)", NOTE),
        (Mount("nfs", "vers=3,local_lock=flock"), "see our locks (local_lock=flock)", NOTE),
        (Mount("lustre", "rw,flock"), "other machines see our renames and locks", OK),
        (Mount("lustre", "rw,localflock"), "does not see our locks (localflock)", NOTE),
        (Mount("fuse.glusterfs", "rw,allow_other"), "other machines see our renames", OK),
        (Mount("fuse.ceph-fuse"), "other machines see our renames and locks", OK),
        (Mount("fuse.sshfs"), "whether a rename is one step", NOTE),
        (Mount("fuseblk"), "whether a rename is one step", NOTE),
        (Mount("tmpfs"), "a restart empties", NOTE),
        (Mount("overlay"), "goes with the container", NOTE),
    ],
)
def test_what_follows_from_the_kind_of_file_system_is_said(
    tmp_path, monkeypatch, mount, said, state
):
    monkeypatch.setattr(doctor_disk, "mount", lambda _: mount)
    monkeypatch.setattr(doctor_disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(doctor_disk, "SLOW_FLUSH", 1e9)
    found = doctor_disk.disk(tmp_path)
    assert (found.state, bool(found.remedy)) == (state, state == NOTE)
    assert f"{tmp_path} ({mount.kind}): " in found.found and said in found.found


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        (Mount("ext4", "ro,relatime"), "(ext4): 12 images in 4 shards"),
        (Mount("nfs", "ro,nolock"), "shards; another machine does not see our locks (nolock)"),
        (Mount("tmpfs", "ro"), "4 shards; memory, which training needs too"),
    ],
)
def test_of_shards_too_it_is_said_what_follows_and_nothing_is_written(
    tmp_path, monkeypatch, mount, said
):
    make_shards(tmp_path / "shards")
    before = sorted((tmp_path / "shards").iterdir())
    monkeypatch.setattr(doctor_disk, "mount", lambda _: mount)
    monkeypatch.setattr(doctor_disk, "disk", lambda _: pytest.fail("it tried to write"))
    config = load("stfpm_mvtec", [f"data.shards={tmp_path / 'shards'}"])
    found = only(doctor_disk.shards, Request(config, [], None))
    assert (found.state, found.remedy) == (OK, None)
    assert said in found.found
    assert sorted((tmp_path / "shards").iterdir()) == before


STAGE3 = '{"zero_optimization": {"stage": 3}}'


@pytest.mark.parametrize(
    ("variables", "mode", "processes"),
    [
        ({}, "ddp", 1),
        ({"KDAD_MODE": "gpu", "KDAD_PROCESSES": "4"}, "ddp", 1),
        ({"KDAD_MODE": "multi_gpu", "KDAD_PROCESSES": "4", "KDAD_MACHINES": "2"}, "ddp", 8),
        ({"KDAD_MODE": "zero2", "KDAD_PROCESSES": "4"}, "zero2", 4),
        ({"KDAD_MODE": "zero2", "KDAD_DEEPSPEED": STAGE3}, "zero3", 1),
        ({"KDAD_MODE": "fsdp2", "KDAD_DEEPSPEED": STAGE3}, "fsdp2", 1),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2", 1),
        ({"KDAD_MODE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "ddp", 1),
        ({"KDAD_MODE": "sideways"}, "KDAD_MODE is 'sideways'; known are cpu, gpu", 1),
        ({"KDAD_MODE": "zero1", "KDAD_DEEPSPEED": "{"}, "own.json, which cannot be read", 1),
        (
            {"KDAD_MODE": "zero1", "KDAD_DEEPSPEED": '{"optimizer": {"type": "Adam"}}'},
            "optimizer.type (not known",
            1,
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP version 1", 1),
    ],
)
def test_the_mode_of_a_launch_is_foreseen_as_its_script_and_its_session_decide(
    tmp_path, monkeypatch, variables, mode, processes
):
    for name in list(libraries.variables()):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        if name == "KDAD_DEEPSPEED":
            (tmp_path / "own.json").write_text(value)
            value = str(tmp_path / "own.json")
        monkeypatch.setenv(name, value)
    config = load("stfpm_mvtec", ["data.shards=none"])
    try:
        found = foreseen_mode(config)
    except KdadError as error:
        assert mode in error.problem
    else:
        assert found == mode
    assert foreseen_processes() == processes


def test_what_a_launch_may_be_asked_for_is_what_its_script_knows():
    script = (REPOSITORY / "launch/environment.sh").read_text()
    assert f"known are {', '.join(ASKED)}$(meant)" in script


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build",
            "560.35.03",
        ),
        ("something else", None),
        (None, None),
    ],
)
def test_the_driver_is_named_where_it_says_its_version(tmp_path, monkeypatch, said, version):
    monkeypatch.setattr(checks, "DRIVER", tmp_path / "version")
    if said is not None:
        (tmp_path / "version").write_text(said + "\n")
    assert checks.driver_version() == version
    assert (f"NVIDIA driver {version}" in findings(checks.devices)[0].found) == bool(version)


def test_the_file_system_of_a_place_is_that_of_the_mount_above_it():
    assert doctor_disk.mount(Path("/proc/self")).kind == "proc"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("place", ["environment", "netrc"])
def test_a_key_is_found_and_never_told(home, monkeypatch, place):
    assert "no key" in only(checks.wandb).found
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (home / ".netrc").write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
        (home / ".netrc").chmod(0o600)
    found = only(checks.wandb)
    assert "a key is there" in found.found
    assert KEY not in repr(found)


@pytest.mark.parametrize(
    ("script", "patience", "state", "said"),
    [
        ("echo 'slurm 22.05.8'", 60, OK, "slurm 22.05.8"),
        ("echo 'sinfo: error: no controller' >&2; exit 1", 60, NOTE, "no controller"),
        ("exec sleep 300", 0.5, PROBLEM, "does not answer"),
    ],
)
def test_slurm_is_asked_and_not_waited_for(tmp_path, monkeypatch, script, patience, state, said):
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(checks, "SLURM_PATIENCE", patience)
    found = only(checks.slurm)
    assert (found.state, said in found.found) == (state, True), found


def test_a_hub_that_is_not_reached_is_a_note_that_names_the_way_without_it(monkeypatch):
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(checks, "HUB_PATIENCE", 0.3)
        [found] = ends(lambda: list(checks.hub(NOTHING)))
        assert connections(silent) <= 1  # it gave up before the request was made, or after it
    assert found.state == NOTE
    assert "download the weights that your recipe names" in (found.remedy or "")
    assert "secret" not in repr(found)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in only(checks.hub).found


def launch_findings(monkeypatch, settings: Path) -> dict[str, Finding]:
    monkeypatch.setattr(libraries, "accelerate_file", lambda: settings)
    monkeypatch.setattr(libraries, "deepspeed", lambda: None)  # importing it takes seconds
    return {found.name: found for found in findings(checks.launchers)}


def test_settings_that_hold_for_every_launch_are_told(tmp_path, monkeypatch):
    for name in list(libraries.variables()):
        monkeypatch.delenv(name)
    path = tmp_path / "default_config.yaml"
    found = launch_findings(monkeypatch, path)
    assert (found["accelerate"].state, found["DeepSpeed"].state) == (OK, NOTE)
    assert "environment" not in found
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("KDAD_MODE", "zero2")
    found = launch_findings(monkeypatch, path)
    assert "distributed_type: MULTI_CPU, num_processes: 4" in found["accelerate"].found
    assert "ACCELERATE_USE_FSDP=true KDAD_MODE=zero2" in found["environment"].found
    assert found["DeepSpeed"].state == PROBLEM
    path.write_text("{")
    assert launch_findings(monkeypatch, path)["it"].state == PROBLEM


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_a_launch_asks_for_and_are_not_there_are_a_problem(monkeypatch):
    monkeypatch.delenv("KDAD_DEVICE", raising=False)
    monkeypatch.delenv("KDAD_MODE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert findings(checks.devices)[-1].state == OK
    monkeypatch.setenv("KDAD_MODE", "fsdp2")
    assert findings(checks.devices)[-1].state == PROBLEM
    monkeypatch.setenv("KDAD_DEVICE", "cpu")
    assert findings(checks.devices)[-1].state == OK


def test_a_launch_that_the_script_refuses_is_a_problem_in_its_words(monkeypatch):
    monkeypatch.setenv("KDAD_MODE", "sideways")
    found = only(doctor_launch.launched, Request(None, [], 2))
    assert found.state == PROBLEM
    assert "KDAD_MODE is 'sideways'; known are cpu" in found.found


class Alone:
    """A process whose sums are off by something."""

    def __init__(self, error: float) -> None:
        self.rank, self.world, self.device, self.error = 0, 1, torch.device("cpu"), error

    def barrier(self) -> None:
        pass

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        values[-1] += self.error
        return values


def test_a_wrong_sum_is_not_taken_for_a_fast_one():
    assert seconds(Alone(0.0), 4096) > 0  # pyright: ignore[reportArgumentType]
    with pytest.raises(KdadError, match="sum of 4096 bytes over 1 processes is wrong"):
        seconds(Alone(0.5), 4096)  # pyright: ignore[reportArgumentType]
