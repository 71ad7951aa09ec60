"""The verb that runs one configuration over many classes, or in many variants."""

from typing import Annotated

import typer

from kdad_dist.cli.choices import Config, Json, Overrides, Variants
from kdad_dist.cli.text import tell
from kdad_dist.errors import UsageError


def sweep(
    config: Config,
    overrides: Overrides = None,
    categories: Annotated[
        list[str] | None,
        typer.Option(help="Classes, with commas between; may be repeated. All where not given."),
    ] = None,
    variants: Variants = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each class, seeds counted up.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once: here 1, under SLURM as many as fit.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit them as a SLURM array.")] = False,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="With --slurm: an option of sbatch; may be repeated.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Only write the table and page of what is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be started.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, score and report one run per class or variant (and seed); put them into one table."""
    from kdad_dist.sweep.local import commands, refuse_failures, run_all, told
    from kdad_dist.sweep.page import result, write_page
    from kdad_dist.sweep.plan import plan, plan_variants
    from kdad_dist.sweep.slurm import submit

    if sbatch and not slurm:
        raise UsageError("--sbatch goes with --slurm", "add --slurm, or leave it out")
    if variants and categories:
        raise UsageError(
            "--variants and --categories exclude each other",
            "choose the class of all variants with data.category=... or data.normal_class=...",
        )
    if variants:
        planned = plan_variants(config, overrides or [], variants, seeds)
    else:
        planned = plan(config, overrides or [], categories or ["all"], seeds)
    if slurm and not table:
        submitted = submit(planned, jobs, sbatch or [], dry_run)
        tell(submitted.text(), submitted.facts(), as_json)
        return
    if dry_run:
        tell(told(planned), {job.run.name: commands(job) for job in planned.left()}, as_json)
        return
    outcomes = [] if table else run_all(planned, jobs or 1)
    found = write_page(planned)
    tell(result(planned, found), found, as_json)
    refuse_failures(outcomes)
