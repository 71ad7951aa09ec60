"""`accelerate launch`, leaving with the exit code that the run itself would have left with.

Launchers turn every failure of a process into exit code 1 (measured), and a launcher that is told
to stop knows nothing of its processes' end. So the run's `status.json` decides whether it was
preempted; otherwise the exit code of the process that failed first stands.

    python -m kdad_dist.runtime.launcher OPTIONS_OF_ACCELERATE -m kdad_dist VERB ARGUMENTS...
"""

import json
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from kdad_dist.config import load
from kdad_dist.errors import KdadError, Preempted


def main() -> None:
    arguments = launch_command_parser().parse_args()
    status = status_file(arguments.training_script_args)
    before = read(status)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except SignalException as error:
        code = 128 + error.sigval
    else:
        return
    # A status that was there before this launch says nothing of it.
    after = read(status)
    if after != before and json.loads(after)["state"] == "preempted":
        code = Preempted.exit_code
    sys.exit(code if code > 0 else 1)


def status_file(command: list[str]) -> Path | None:
    """Where `train CONFIG OVERRIDES...` or `VERB RUN` says how it ended, if the words name a run."""
    _verb, first, *overrides = [*command, "", ""]
    if Path(first).is_dir():
        return Path(first) / "status.json"
    try:
        return load(first, [word for word in overrides if "=" in word]).directory / "status.json"
    except KdadError:
        return None  # the program itself will say what is wrong


def read(path: Path | None) -> str:
    return path.read_text(encoding="utf-8") if path is not None and path.exists() else ""


if __name__ == "__main__":
    main()
