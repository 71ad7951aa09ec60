"""Two machines: network namespaces with addresses of their own, joined by a cable."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.helpers import make_mvtec
from tests.kdad import exported, succeeds
from tests.launcher import wait_for
from tests.needs import REPOSITORY, require_or_skip

pytestmark = pytest.mark.launch

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Machine:
    """A namespace of its own; what runs in it sees nothing of this machine's network."""

    def __init__(self, number: int) -> None:
        self.number, self.name = number, f"kdad-{os.getpid()}-{number}"

    def start(self, config: Path, *overrides: str, machines: int = 2) -> subprocess.Popen[str]:
        """`launch/train.sh` with one process."""
        variables = {
            "KDAD_PYTHON": sys.executable,
            "KDAD_MODE": "cpu",
            "KDAD_PROCESSES": "1",
            "KDAD_MACHINES": str(machines),
            "KDAD_MACHINE_RANK": str(self.number),
            "KDAD_MAIN_ADDRESS": ADDRESSES[0],
            "GLOO_SOCKET_IFNAME": "cable",
            "PYTHONPATH": str(REPOSITORY),
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, REPOSITORY / "launch/train.sh", config, *overrides],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lose(self) -> None:
        """Power off: everything that runs there is gone at once."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):  # it has just ended, as it does without its launcher
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    if shutil.which("ip") is None:
        require_or_skip("netns", "ip is not installed (apt-get install iproute2)")
    both = Machine(0), Machine(1)
    with ExitStack() as stack:
        try:
            for machine in both:
                ip("netns", "add", machine.name)
                stack.callback(ip, "netns", "del", machine.name)
                stack.callback(machine.lose)
                ip("-n", machine.name, "link", "set", "lo", "up")
            cable = ["name", "cable", "netns"]
            ip("link", "add", *cable, both[0].name, "type", "veth", "peer", *cable, both[1].name)
            for machine, address in zip(both, ADDRESSES, strict=True):
                ip("-n", machine.name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", machine.name, "link", "set", "cable", "up")
        except AssertionError as error:
            require_or_skip("netns", f"network namespaces may not be made here: {error}")
        yield both


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_mvtec(tmp_path / "images", train=14)
    succeeds("pack", tmp_path / "images", tmp_path / "shards", "--size", 32)
    values = {
        "name": "two",
        "data": {"shards": str(tmp_path / "shards"), "image_size": 32},
        "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1]}},
        "optim": {"name": "sgd", "lr": 1.0e-3},
        "train": {"batch_size": 4, "log_every": 1, "validate_every": 1000},
        "checkpoint": {"every_steps": 10},
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_training_on_two_machines_goes_on_alone_when_one_of_them_is_lost(
    machines: tuple[Machine, Machine], config: Path
) -> None:
    run, undisturbed = config.parent / "lost", config.parent / "undisturbed"
    kept, lost = machines
    words = [f"output={run}", "train.steps=100000"]
    processes = [machine.start(config, *words) for machine in machines]
    lines = run / "metrics.jsonl"

    def trains() -> bool:
        assert all(process.poll() is None for process in processes)
        return lines.is_file() and lines.read_bytes().count(b"\n") > 15

    wait_for(trains, 300)
    lost.lose()
    text, _ = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 1, text
    assert "2 processes" in text and "process 0 of 2 lost process 1 of 2" in text, text
    assert json.loads((run / "status.json").read_text())["state"] == "failed"

    steps = f"train.steps={len(losses(run)) + 30}"
    more = [f"output={run}", steps, "train.changed_config=accept"]
    alone = kept.start(config, *more, machines=1)
    text, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, text
    assert "going on from step" in text
    succeeds("train", config, f"output={undisturbed}", steps, processes=2)
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-5)
    expected = load_file(exported(undisturbed))
    for name, values in load_file(exported(run)).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)
