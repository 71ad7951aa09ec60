"""Whether a run has anything left to do, told from what it wrote, before anything is built."""

import logging
from pathlib import Path

from kdad_dist import files
from kdad_dist.config.changes import changed_keys
from kdad_dist.config.load import load_run
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index
from kdad_dist.errors import DataError
from kdad_dist.runtime.rundir import CHECKPOINTS, STATUS_FILE, data_fact, note
from kdad_dist.runtime.saved import Checkpoints
from kdad_dist.runtime.together import gathered, shared

log = logging.getLogger(__name__)


def finished(config: RunConfig, is_main: bool) -> bool:
    """Whether the run has taken all its steps; what is free to change is noted then.

    Collective over the processes. Whatever is odd (other data, a damaged checkpoint) is left to
    those who build the run, and say what is wrong.
    """
    run = config.directory
    claim = shared(lambda: claims_to_be(config) if is_main else None)
    [steps, *_] = gathered(claim and claim[0])
    if steps is None:
        return False
    checkpoints = Checkpoints(run / CHECKPOINTS)
    path = checkpoints.latest()
    if path is None or checkpoints.manifest(path)["step"] < steps:
        return False
    if claim is not None:
        note(config, claim[1])
    say_so(run, steps)
    return True


def claims_to_be(config: RunConfig) -> tuple[int, Index] | None:
    """Steps and data of a run whose last word was that it finished, as it is configured now."""
    run = config.directory
    status = files.read_json(run / STATUS_FILE)
    if status.get("state") != "finished" or changed_keys(load_run(run), config):
        return None
    try:
        trained_on = data_fact(config, "fingerprint")
    except DataError:
        return None
    index = Index.read(config.data.shards)
    return (status["steps"], index) if index.fingerprint == trained_on else None


def say_so(run: Path, steps: int) -> None:
    log.info(
        "%s is finished: it has taken all its %d steps. To train it longer, start it again with "
        "more train.epochs (or train.steps) and train.changed_config=accept",
        run,
        steps,
    )
