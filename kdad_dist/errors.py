"""Errors that a user can act on: what is wrong, what was found, where, and what to do next.

Every error that a user can cause is a `KdadError`. The command line prints its text without a
traceback and leaves with its `exit_code`. Programmers' mistakes are `assert`s instead.
"""


class KdadError(ValueError):
    """A problem that the user can mend.

    Args:
        problem: what is wrong, what was found and where, in one or two sentences.
        remedy: what to do next, in the imperative. Printed on a line of its own.
    """

    exit_code = 1
    of_all = False
    """Whether all processes of a launch raise it together, so that one of them says it."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n  -> {remedy}")
        self.problem = problem
        self.remedy = remedy


class UsageError(KdadError):
    """The command, its arguments or the launch are not what they need to be."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more values of the configuration are wrong; the message names all of them."""


class DataError(KdadError):
    """An image, a folder, a shard or an index is missing, damaged or not what it claims to be."""


class WeightsError(KdadError):
    """Pretrained weights cannot be found, read, or do not fit the network."""


class CheckpointError(KdadError):
    """A checkpoint is missing, damaged or belongs to another run."""


class ExportError(KdadError):
    """What was exported is not what the run computes, or cannot be expressed in the format."""


class TrainingError(KdadError):
    """Training cannot go on: a loss or a gradient is not finite."""

    of_all = True


class PeerLost(KdadError):
    """Another process of the launch ended or fell silent; its own error says why."""


class Preempted(KdadError):
    """It was asked to stop, kept what it had done, and wants to be started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: "try again"
    of_all = True


class Interrupted(KdadError):
    """A person left it by Ctrl-C."""

    exit_code = 130
    """What a shell makes of SIGINT, and typer too."""
    of_all = True

    def __init__(self) -> None:
        super().__init__(
            "interrupted", "start the same command again; pack, train, score and sweep then go on"
        )
