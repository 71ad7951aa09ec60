"""The verbs of `kdad`. Nothing heavy is imported before a verb runs."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from kdad_dist import __version__
from kdad_dist.cli.data import pack, verify
from kdad_dist.cli.look import compare, doctor, status
from kdad_dist.cli.results import export, report
from kdad_dist.cli.run import demo, score, train
from kdad_dist.cli.sweep import sweep
from kdad_dist.errors import Interrupted, KdadError, Preempted, UsageError
from kdad_dist.runtime.stopping import LAUNCHER, interrupts_prevail
from kdad_dist.wording import printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, score and report visual anomaly detectors on any number of GPUs.",
)
VERBS = (demo, doctor, pack, verify, train, score, report, sweep, status, compare, export)
"""In the order in which a newcomer meets them."""
TURN = 10.0
"""Seconds that a process has to say the error of all before the others leave."""


def main() -> None:
    """Runs the command line; an error of the user becomes one message and an exit code."""
    try:
        refuse_a_named_shell(sys.argv[1:])
        with interrupts_prevail():
            # One name, however it was started: `python -m kdad_dist` would be a completion's own.
            app(prog_name="kdad")
    except KdadError as error:
        fail(error)
    except KeyboardInterrupt:
        fail(Interrupted())
    except SystemExit as left:
        if left.code == Interrupted.exit_code:
            fail(Interrupted())
        raise


def fail(error: KdadError) -> NoReturn:
    """Leaves with an error, which one process says where every one has it."""
    # All processes of a node find the same mistake in the command or the configuration.
    number = "RANK" if error.of_all else "LOCAL_RANK" if isinstance(error, UsageError) else ""
    silent = os.environ.get(number, "0") != "0"
    if silent and LAUNCHER in os.environ and not isinstance(error, Preempted | Interrupted):
        # It ends all processes once one has left, also the one that is about to say why.
        with suppress(KeyboardInterrupt):
            time.sleep(TURN)
        silent = error.of_all  # a mistake that ended nobody else on this node is of this one alone
    if not silent:
        print(printable(f"kdad: {error}"), file=sys.stderr)
    sys.exit(error.exit_code)


def refuse_a_named_shell(words: Sequence[str]) -> None:
    """Raises UsageError where a shell is named, which would be passed over: it is found out."""
    if words[:1] in (["--install-completion"], ["--show-completion"]) and words[1:]:
        raise UsageError(
            f"{words[0]} is of the shell that it is typed in, and takes no name of one",
            "type it without, in that shell",
        )


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"kdad {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    # torch warns from C++ about a DDP option that is set on purpose (runtime/session.py).
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from kdad_dist.runtime.progress import log_to_stderr

    log_to_stderr()


for verb in VERBS:
    app.command()(verb)
