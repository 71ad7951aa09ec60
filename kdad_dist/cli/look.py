"""The verbs that look at runs and machines, and change neither."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kdad_dist.cli.choices import Json, Overrides, recipes
from kdad_dist.cli.text import answer, tell
from kdad_dist.errors import CheckpointError, UsageError
from kdad_dist.wording import amount


def status(
    folder: Annotated[Path, typer.Argument(help="A run, a sweep, or a folder above them.")] = Path(
        "runs"
    ),
    watch: Annotated[bool, typer.Option("--watch", help="Look again until Ctrl-C.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read checkpoints whole; exit 1 if one is damaged.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show every run below a folder: state, step, pace, last checkpoint, result."""
    from dataclasses import asdict

    from kdad_dist.runtime.progress import progress
    from kdad_dist.status.survey import survey
    from kdad_dist.status.text import show, shown
    from kdad_dist.status.text import watch as keep_watching

    if watch and (verify or as_json):
        raise UsageError(
            "--watch is for a person, and looks again every few seconds",
            "leave out --verify and --json, or ask for them without --watch",
        )
    if watch:
        keep_watching(folder)
    with progress("verifying" if verify else "reading", 1, "runs", brief=not verify) as bar:
        found = survey(folder, verify, bar.at)
    show(shown(found, folder))
    if as_json:
        answer({"runs": [asdict(run) for run in found]})
    faults = [fault for run in found for fault in run.damaged]
    if verify and faults:
        raise CheckpointError(
            f"{amount(len(faults), 'checkpoint is', 'checkpoints are')} damaged",
            "delete their directories; training then goes on from the ones before them",
        )


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two runs or more.")],
    images: Annotated[
        int, typer.Option(min=0, help="Images to name; of detectors, of either label.")
    ] = 5,
    as_json: Json = False,
) -> None:
    """Show where runs differ: configuration, figures, images judged most differently."""
    from kdad_dist.compare.differences import compare as compare_runs
    from kdad_dist.compare.text import told

    facts = compare_runs(runs, images)
    tell(told(facts), facts, as_json)


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(help="A configuration: would it start here?", autocompletion=recipes),
    ] = None,
    overrides: Overrides = None,
    launch: Annotated[
        int | None, typer.Option(min=1, help="Start so many processes, and let them exchange sums.")
    ] = None,
    directory: Annotated[
        list[Path] | None, typer.Option(help="Try this one too; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine; exit 1 if something on it would break a run, and say what to do."""
    if "KDAD_WORLD_SIZE" in os.environ:  # one of the processes that launch/doctor.sh has started
        if config or launch or directory:
            raise UsageError(
                "KDAD_WORLD_SIZE is set, as in a launch: it measures what processes exchange",
                "unset KDAD_WORLD_SIZE to look at the machine",
            )
        from kdad_dist.doctor.launch import told
        from kdad_dist.runtime.exchange import measure

        facts = measure()
        tell(told(facts), facts, as_json)
        return
    from dataclasses import asdict

    from kdad_dist.config.load import load
    from kdad_dist.doctor.checks import Request
    from kdad_dist.doctor.text import refuse_problems, show

    checked = None if config is None else load(config, overrides or [])
    found = show(Request(checked, directory or [], launch))
    if as_json:
        answer({"findings": [asdict(finding) for finding in found]})
    refuse_problems(found)
