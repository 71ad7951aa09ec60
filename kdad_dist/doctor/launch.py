"""Whether the launcher of a training really connects processes, and how fast they talk."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from kdad_dist import files
from kdad_dist.doctor.checks import OK, PROBLEM, Finding, Request
from kdad_dist.wording import amount

log = logging.getLogger(__name__)
PATIENCE = 180
"""Seconds for all processes to start, meet and leave."""
FAREWELL = 10
"""Seconds for a launcher to end its processes."""


def launched(request: Request) -> Iterator[Finding]:
    """Starts the processes as `launch/train.sh` does."""
    if request.processes is None:
        return
    number = "one process" if request.processes == 1 else f"{request.processes} processes"
    log.info("starting %s, for at most %d s", number, PATIENCE)
    code, output, messages = start(request.processes)
    documents = re.findall(r"^\{\n.*?^\}$", output, re.MULTILINE | re.DOTALL)
    if code or not documents:
        ours = [line for line in messages.splitlines() if line.startswith("kdad: ")]
        said = ours or messages.strip().splitlines()[-3:] or [f"exit code {code}"]
        script = files.shipped("launch") / "doctor.sh"
        remedy = f"KDAD_PROCESSES={request.processes} {script} says more; see docs/cluster.md"
        yield Finding("launch", PROBLEM, "; ".join(said).removeprefix("kdad: "), remedy)
        return
    yield Finding("launch", OK, told(json.loads(documents[-1])))


def start(processes: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the launch; it is ended where it takes too long."""
    variables = {
        "KDAD_MODE": os.environ.get("KDAD_MODE") or mode(processes),
        "KDAD_PROCESSES": str(processes),
        "KDAD_PYTHON": sys.executable,
    }
    process = subprocess.Popen(  # noqa: S603
        ["bash", str(files.shipped("launch") / "doctor.sh"), "--json"],  # noqa: S607
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, messages = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return 1, "", f"the processes did not meet within {PATIENCE} s"
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its processes then
            try:
                process.wait(FAREWELL)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.returncode, output, messages


def mode(processes: int) -> str:
    """The mode that fits this machine."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "cpu" if gpus == 0 else "gpu" if processes == 1 else "multi_gpu"


def told(facts: dict[str, Any]) -> str:
    """What `kdad_dist.runtime.exchange` measured, in words."""
    who = amount(facts["processes"], "process", "processes")
    machines = "" if facts["machines"] == 1 else f" on {facts['machines']} machines"
    where = f"{who}{machines}, mode {facts['mode']}, {facts['device']}"
    if facts["gigabytes_per_second"] is None:
        return f"{where}: started as asked; there is nobody to talk to"
    pace = f"{facts['gigabytes_per_second']:.3g} GB/s for each"
    size = f"{facts['bytes'] / 2**20:.0f} MiB summed"
    wait = f"{facts['latency_ms']:.3g} ms for a single number"
    return f"{where}, {facts['backend']}: {pace} ({size}), {wait}"
