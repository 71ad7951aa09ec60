"""The directory of a run: who may use it, and for which configuration."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kdad_dist.config import RunConfig, changed_keys, dump, load_run
from kdad_dist.errors import ConfigError
from kdad_dist.runtime import environment, files
from kdad_dist.runtime.preemption import PREEMPT_FILE

log = logging.getLogger(__name__)


def refuse_changes(config: RunConfig) -> None:
    """Refuses a directory that holds the run of another configuration, unless told to accept it.

    Raises:
        ConfigError: naming the keys that differ.
    """
    run = config.directory
    if not (run / "config.yaml").is_file():
        return
    changes = changed_keys(load_run(run), config)
    if not changes:
        return
    text = "\n  ".join(changes)
    if config.train.changed_config == "refuse":
        raise ConfigError(
            f"{run} holds a run of another configuration:\n  {text}",
            "give this run another `output` (or `name`), or set train.changed_config=accept",
        )
    log.warning("going on in %s with a changed configuration:\n  %s", run, text)


@contextmanager
def claimed(config: RunConfig) -> Iterator[None]:
    """Makes the directory, keeps other processes out of it, and notes what runs in it.

    Raises:
        DataError: the directory cannot be written, now or later.
        UsageError: another process is using it.
    """
    run = config.directory
    with files.writing(run):
        run.mkdir(parents=True, exist_ok=True)
        with files.exclusive(run):
            (run / PREEMPT_FILE).unlink(missing_ok=True)
            files.write_text(run / "config.yaml", dump(config))
            files.write_json(run / "environment.json", environment.describe())
            yield
