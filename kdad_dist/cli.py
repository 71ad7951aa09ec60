"""The verbs of `kdad`. Nothing heavy is imported before a verb runs."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kdad_dist import __version__
from kdad_dist.cli_choices import Format, Layout, Mode, Resize
from kdad_dist.cli_text import judged, summary
from kdad_dist.errors import DataError, KdadError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, score and report visual anomaly detectors on any number of GPUs.",
)
INTERRUPTED = 130
"""What typer makes of Ctrl-C."""
Run = Annotated[Path, typer.Argument(help="The directory that `kdad train` wrote.")]
Config = Annotated[
    str, typer.Argument(help="A YAML file, or a shipped recipe such as stfpm_mvtec.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the configuration: key.subkey=value ...")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def main() -> None:
    """Runs the command line; an error of the user becomes one message and an exit code."""
    try:
        app()
    except KdadError as error:
        fail(error)
    except SystemExit as left:
        if left.code == INTERRUPTED:
            again = "start the same command again; pack, train and sweep then go on"
            say(f"kdad: interrupted\n  -> {again}")
        raise


def fail(error: KdadError) -> NoReturn:
    """Leaves with an error, which one process says where every one has it."""
    # All processes of a node find the same mistake in the command or the configuration.
    everywhere = isinstance(error, UsageError) and os.environ.get("LOCAL_RANK", "0") != "0"
    if not (everywhere or (error.shared and os.environ.get("RANK", "0") != "0")):
        print(f"kdad: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


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


def say(text: str) -> None:
    """For a person: on stderr, once per launch."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def answer(value: Any) -> None:
    """For a program: one JSON document on stdout, once per launch."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(value, indent=2))  # in ASCII: file names need not be UTF-8


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to put everything.")] = Path("kdad-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another data set.")] = 0,
) -> None:
    """Generate a small defect data set, pack, train, score and report it, without network."""
    from kdad_dist.demo import demo as run

    run(out, seed)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: on so many processes (1).")
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="With --dry-run: trained so (ddp).")] = None,
    as_json: Json = False,
) -> None:
    """Train a detector, or go on where its run stopped."""
    from kdad_dist.config import load
    from kdad_dist.runtime.stopping import StopRequest

    checked = load(config, overrides or [])
    if dry_run:
        from kdad_dist.train_dryrun import dry_run as foresee
        from kdad_dist.train_dryrun import told

        facts = foresee(checked, processes or 1, mode or Mode.DDP)
        say(told(facts))
        if as_json:
            answer(facts)
        return
    if processes or mode or as_json:
        raise UsageError(
            "--processes, --mode and --json go with --dry-run",
            "processes and mode of a training are chosen by its launch: see launch/README.md",
        )
    with StopRequest(checked.directory, checked.train.max_time).heeded() as stop:
        from kdad_dist.train import train as run  # takes seconds, in which a request may come

        run(checked, stop)
    say(f"trained: {checked.directory}\nnext: kdad score {checked.directory}")


@app.command()
def score(
    run: Run,
    overrides: Overrides = None,
    shards: Annotated[
        str | None,
        typer.Option(help="Score the test split of these shards; results get a name of their own."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Score new images: a file, folder or pattern; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --images: where to write (RUN/predictions).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score the test split of a run's data, or new images."""
    from kdad_dist.config import load_run
    from kdad_dist.report_text import speed, table
    from kdad_dist.runtime.stopping import StopRequest

    more = [] if shards is None else [f"data.shards={json.dumps(shards)}"]
    config = load_run(run, [*(overrides or []), *more])
    if images:
        with StopRequest(config.directory).heeded() as stop:
            from kdad_dist.predict import predict

            path, facts = predict(config, images, out, stop)
        if facts:
            say(f"{judged(facts)}\n{speed(facts['provenance'])}\nscores: {path}")
            if as_json:
                answer(facts)
        return
    if out is not None:
        raise UsageError("--out goes with --images", "leave it out; scores are written to the run")
    from kdad_dist.runtime.rundir import metrics_file, other_data

    with StopRequest(config.directory).heeded() as stop:
        from kdad_dist.score import score as score_run

        metrics = score_run(config, stop)
    if metrics:
        after = "" if other_data(config) else f"\nnext: kdad report {run}"
        done = f"{table(metrics)}\n\n{speed(metrics['provenance'])}"
        say(f"{done}\nmetrics: {metrics_file(config)}{after}")
        if as_json:
            answer(metrics)


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    categories: Annotated[
        list[str] | None,
        typer.Option(help="Classes, with commas between; may be repeated. All where not given."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each class, seeds counted up.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once: here 1, under SLURM as many as fit.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit them as a SLURM array.")] = False,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="With --slurm: an option of sbatch; may be repeated.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Only write the table of what is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be started.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, score and report one run per class (and seed), and put them into one table."""
    from kdad_dist import sweep_local, sweep_slurm
    from kdad_dist.sweep import plan
    from kdad_dist.sweep_table import as_markdown, write_table

    if sbatch and not slurm:
        raise UsageError("--sbatch goes with --slurm", "add --slurm, or leave it out")
    planned = plan(config, overrides or [], categories or ["all"], seeds)
    if slurm and not table:
        submitted = sweep_slurm.submit(planned, jobs, sbatch or [], dry_run)
        say(submitted.text())
        if as_json:
            answer(submitted.facts())
        return
    if dry_run:
        todo = {job.run.name: sweep_local.commands(job) for job in planned.left()}
        say("\n".join(shlex.join(command) for words in todo.values() for command in words))
        if as_json:
            answer(todo)
        return
    outcomes = [] if table else sweep_local.run_all(planned, jobs or 1)
    found = write_table(planned)
    say(f"{as_markdown(found)}\ntable: {planned.directory / 'table.md'}")
    if as_json:
        answer(found)
    sweep_local.refuse_failures(outcomes)


@app.command()
def report(run: Run) -> None:
    """Write one self-contained HTML page about a run."""
    from kdad_dist.report import write_report

    say(f"report: {write_report(run)}")


@app.command()
def export(
    run: Run,
    overrides: Overrides = None,
    format: Annotated[Format, typer.Option(help="Kind of file.")] = Format.SAFETENSORS,
) -> None:
    """Write the student's weights to one file, checked against the checkpoint."""
    from kdad_dist.config import load_run
    from kdad_dist.export import export as export_run

    path, difference = export_run(load_run(run, overrides or []))
    say(f"exported: {path}\nlargest difference to the checkpoint: {difference:g}")


@app.command()
def pack(
    root: Annotated[
        Path, typer.Argument(readable=False, help="A folder of images; it is never changed.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder for the shards.")],
    layout: Annotated[Layout, typer.Option(help="How the folder is arranged.")] = Layout.AUTO,
    category: Annotated[
        list[str] | None, typer.Option(help="Only this category; may be repeated.")
    ] = None,
    size: Annotated[int, typer.Option(min=0, help="Resize to this; 0: keep the files.")] = 256,
    resize: Annotated[
        Resize, typer.Option(help="Squash to a square, or keep the aspect ratio.")
    ] = Resize.SQUASH,
    workers: Annotated[int, typer.Option(min=0, help="0: one per core.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List damaged files and go on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pack a folder of images into shards with an index."""
    from dataclasses import asdict

    from kdad_dist.data.writer import pack as pack_folder
    from kdad_dist.runtime.progress import progress

    with progress("packing", 1, "images") as bar:
        result = pack_folder(
            root,
            out,
            layout=layout.value,
            categories=category,
            size=size,
            mode=resize.value,
            workers=workers or None,
            skip_bad=skip_bad,
            progress=bar.at,
        )
    say(summary(asdict(result)))
    if as_json:
        answer(asdict(result))


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="The folder that `kdad pack` wrote.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too.")] = False,
    as_json: Json = False,
) -> None:
    """Check counts, hashes and, on request, images; exit 1 names every fault."""
    from kdad_dist.data.verify import verify as verify_shards

    faults = verify_shards(shards, decode)
    if as_json:
        answer({"shards": shards, "faults": faults})
    for fault in faults:
        say(fault)
    if faults:
        number = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise DataError(f"{shards} has {number}", "copy it again, or pack it again")
    say(f"{shards} is sound")
