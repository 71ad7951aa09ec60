"""What `kdad doctor` looks at, in order, and what a person sees of it."""

from collections.abc import Sequence

from rich.text import Text

from kdad_dist.doctor import checks
from kdad_dist.doctor.checks import NOTE, OK, PROBLEM, Finding, Request, examine
from kdad_dist.doctor.disk import disks, shards
from kdad_dist.doctor.launch import launched
from kdad_dist.errors import KdadError
from kdad_dist.runtime.progress import CONSOLE
from kdad_dist.wording import printable

CHECKS = (
    ("python", checks.python),
    ("torch", checks.devices),
    ("backends", checks.backends),
    ("launchers", checks.launchers),
    ("disk", disks),
    ("hub", checks.hub),
    ("W&B", checks.wandb),
    ("SLURM", checks.slurm),
    ("shards", shards),
    ("training", checks.training),
    ("launch", launched),
)
COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


def show(request: Request) -> list[Finding]:
    """All findings, each shown as soon as it is there: some take seconds."""
    found = []
    for finding in examine(request, CHECKS):
        found.append(finding)
        CONSOLE.print(line(finding), soft_wrap=True, highlight=False)
    return found


def line(finding: Finding) -> Text:
    text = Text(f"{finding.state:8}", COLOURS[finding.state])
    text = Text.assemble(text, f"{finding.name:14} {printable(finding.found)}")
    if finding.remedy:
        text.append(f"\n{'':8}{'':14} -> {printable(finding.remedy)}")
    return text


def refuse_problems(found: Sequence[Finding]) -> None:
    """Raises:
    KdadError: something would break a run.
    """
    names = [finding.name for finding in found if finding.state == PROBLEM]
    if names:
        what = "one thing" if len(names) == 1 else f"{len(names)} things"
        raise KdadError(
            f"{what} here would break a run: {', '.join(names)}",
            "do what is said above, and ask again",
        )
