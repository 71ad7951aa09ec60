"""The verbs that train and score."""

from pathlib import Path
from typing import Annotated

import typer

from kdad_dist.cli.choices import Config, Json, Mode, Overrides, Run
from kdad_dist.cli.text import LOADING, judged, say, tell
from kdad_dist.errors import UsageError
from kdad_dist.wording import kdad


def demo(
    out: Annotated[Path, typer.Option(help="Where to put everything.")] = Path("kdad-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another data set.")] = 0,
) -> None:
    """Generate a small defect data set, pack, train, score and report it, without network."""
    from kdad_dist.demo.commands import demo as run

    run(out, seed)


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
    from kdad_dist.config.load import load
    from kdad_dist.runtime.progress import uncounted
    from kdad_dist.runtime.stopping import StopRequest

    checked = load(config, overrides or [])
    if dry_run:
        with uncounted(LOADING):
            from kdad_dist.train.dry_run import dry_run as foresee
            from kdad_dist.train.dry_run import told

        facts = foresee(checked, processes or 1, mode or Mode.DDP)
        tell(told(facts), facts, as_json)
        return
    if processes or mode or as_json:
        raise UsageError(
            "--processes, --mode and --json go with --dry-run",
            "processes and mode of a training are chosen by its launch: see launch/README.md",
        )
    with StopRequest(checked.directory, checked.train.max_time).heeded() as stop:
        with uncounted(LOADING):  # takes seconds, in which a request may come
            from kdad_dist.train.loop import train as run

        run(checked, stop)
    say(f"trained: {checked.directory}\nnext: {kdad('score', checked.directory)}")


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
    both: Annotated[
        bool, typer.Option("--both", help="The last checkpoint too, beside the selected one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score the test split of a run's data, or new images."""
    from kdad_dist.config.load import load_run, override
    from kdad_dist.report.text import scored, speed
    from kdad_dist.runtime.progress import uncounted
    from kdad_dist.runtime.stopping import StopRequest

    more = [] if shards is None else [override("data.shards", shards)]
    config = load_run(run, [*(overrides or []), *more])
    if images:
        if both:
            raise UsageError("--both is of the test split", "leave it out with --images")
        with StopRequest(config.directory).heeded() as stop:
            with uncounted(LOADING):
                from kdad_dist.predict import predict

            path, facts = predict(config, images, out, stop)
        if facts:
            tell(f"{judged(facts)}\n{speed(facts['provenance'])}\nscores: {path}", facts, as_json)
        return
    if out is not None:
        raise UsageError("--out goes with --images", "leave it out; scores are written to the run")
    from kdad_dist.runtime.rundir import metrics_file, other_data, unfinished

    with StopRequest(config.directory).heeded() as stop:
        with uncounted(LOADING):
            from kdad_dist.score.both import best_and_last, score_both
            from kdad_dist.score.scoring import score as score_one

        found = score_both(config, stop) if both else (score_one(config, stop), None)
    metrics, other = found[::-1] if both and config.score.checkpoint == "last" else found
    if metrics:
        after = "" if other_data(config) else f"\nnext: {kdad('report', run)}"
        written = map(metrics_file, best_and_last(config) if both else [config])
        of = unfinished(config.directory, metrics["provenance"]["checkpoint_step"])
        done = scored(metrics, other, [doubt for doubt in (of, config.doubt) if doubt])
        tell(f"{done}\nmetrics: {' and '.join(map(str, written))}{after}", metrics, as_json)
