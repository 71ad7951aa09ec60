"""`accelerate launch`, leaving with the exit code that the run itself would have left with.

Launchers turn every failure of a process into exit code 1 (measured), and a launcher that is told
to stop knows nothing of its processes' end. So the run's `status.json` decides whether it was
preempted; otherwise the exit code of the process that failed first stands. A scoring has no status,
and goes on from what it kept whenever SIGTERM ended it.

    python -m kdad_dist.runtime.launcher OPTIONS_OF_ACCELERATE -m kdad_dist VERB ARGUMENTS...
    python -m kdad_dist.runtime.launcher --run-directory CONFIG OVERRIDES...
"""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

from kdad_dist.config.load import load
from kdad_dist.errors import Interrupted, KdadError, Preempted, UsageError
from kdad_dist.runtime.stopping import interrupts_prevail


def main() -> int:
    if sys.argv[1:2] == ["--run-directory"]:
        sys.stdout.write(f"{run_directory(sys.argv[2:])}\n")
        return 0
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args()
    verb, *words = arguments.training_script_args
    try:
        status = run_directory(words) / "status.json"
    except KdadError:
        status = Path()  # the program itself will say what is wrong
    before = read(status)
    code = launch(arguments)
    return exit_code(verb, code, saved(before, read(status)))


def saved(before: str, after: str) -> bool:
    """Whether a training was preempted in order, from its status before and after the launch."""
    if after in (before, ""):  # which says nothing of this launch
        return False
    said = json.loads(after)
    # A second Ctrl-C ends it at once, without a checkpoint.
    return said["state"] == "preempted" and said["reason"] != Interrupted().problem


def exit_code(verb: str, code: int, saved: bool) -> int:
    """What a launch leaves with whose launcher got `code`; `saved`: its training was preempted."""
    stopped = verb == "score" and code == 128 + signal.SIGTERM
    return Preempted.exit_code if code and (saved or stopped) else code


def run_directory(words: list[str]) -> Path:
    """The directory that the words after `train` (CONFIG OVERRIDES...) or `score` (RUN) name.

    Raises:
        ConfigError: they name none.
    """
    first, *others = words or [""]
    if first and (Path(first) / "config.yaml").is_file():
        return Path(first)
    return load(first, [word for word in others if "=" in word]).directory


def read(status: Path) -> str:
    return status.read_text(encoding="utf-8") if status.is_file() else ""


def launch(arguments: object) -> int:
    """Runs `accelerate launch`; returns 0, or the exit code of the process that failed first."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger(SignalException.__module__).addFilter(tells_more)
    # One process alone is only waited for: it has had the same Ctrl-C, and ends in order. The
    # launcher of several takes the signal for itself.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(arguments)
    except ImportError as error:
        raise UsageError(
            f"accelerate cannot launch in this mode: {error}",
            "for DeepSpeed: pip install 'kdad_dist[deepspeed]'; or choose another KDAD_MODE",
        ) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except SignalException as error:
        code = 128 + error.sigval
    else:
        return 0
    return code if code > 0 else 1


def tells_more(record: logging.LogRecord) -> bool:
    """Whether a line of torch's launcher tells more than the processes did.

    One that left by itself said why; one that a signal ended could not.
    """
    said = record.getMessage()
    by_itself = said.startswith("failed (exitcode: ") and "(exitcode: -" not in said
    return not (by_itself or said.startswith("Sending process "))


if __name__ == "__main__":
    try:
        with interrupts_prevail():
            sys.exit(main())
    except (KdadError, KeyboardInterrupt) as error:
        said = error if isinstance(error, KdadError) else Interrupted()
        sys.stderr.write(f"kdad: {said}\n")
        sys.exit(said.exit_code)
