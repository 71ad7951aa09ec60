"""Scoring the selected checkpoint of a run, and its last one beside it."""

from dataclasses import replace
from typing import Any

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.runtime.output import write
from kdad_dist.runtime.restore import is_one_checkpoint
from kdad_dist.runtime.rundir import metrics_file
from kdad_dist.runtime.stopping import StopRequest
from kdad_dist.score.scoring import begun, score_one


def score_both(config: RunConfig, request: StopRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores the selected and the last checkpoint as `score` does; once where both are the same.

    Returns:
        The figures of either, on the main process; {} on others.
    """
    best, last = best_and_last(config)
    with begun(config) as here:
        selected = score_one(best, request, here)
        if not is_one_checkpoint(config):
            final = score_one(last, request, here)
        else:
            file, final = metrics_file(last), renamed(selected)
            write(file, lambda: files.write_json(file, final) if here.is_main else None)
    return selected, final


def best_and_last(config: RunConfig) -> tuple[RunConfig, RunConfig]:
    """The same configuration for the selected and for the last checkpoint."""
    best, last = (
        replace(config, score=replace(config.score, checkpoint=which)) for which in ("best", "last")
    )
    return best, last


def renamed(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures of the selected checkpoint as those of the last one, which it is."""
    if not metrics:
        return metrics
    rule = {"checkpoint_rule": "last; the same as the selected one, so scored once"}
    return metrics | {"provenance": metrics["provenance"] | rule}
