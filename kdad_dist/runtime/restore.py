"""A trained detector from its run directory."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdad_dist import files
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import CheckpointError, DataError
from kdad_dist.methods.base import Method
from kdad_dist.methods.readout import Standard, readout_of
from kdad_dist.models.gather import rank_here
from kdad_dist.runtime.classifiers import choose_sources, make_method, without_comparison
from kdad_dist.runtime.identity import frozen_weights
from kdad_dist.runtime.manifest import read_manifest, step_name, verify
from kdad_dist.runtime.progress import uncounted
from kdad_dist.runtime.rundir import CHECKPOINTS, refuse_another_reading, scores_folder
from kdad_dist.runtime.saved import Checkpoints
from kdad_dist.runtime.tensors import STUDENT, Tensors, open_checkpoint, read_into
from kdad_dist.runtime.together import shared
from kdad_dist.wording import kdad

log = logging.getLogger(__name__)
STANDARD = "standard.safetensors"


@dataclass(frozen=True)
class Trained:
    """A method with trained weights, and where they come from."""

    method: Method
    step: int
    rule: str
    """How the checkpoint was chosen, in words."""


def restore(config: RunConfig, explains: bool = False) -> Trained:
    """The method of a run with the weights of the checkpoint that `score.checkpoint` asks for.

    Collective where processes are connected: every process loads the whole student.

    Args:
        explains: whether a classifier may be compared with its teacher, who is needed then.

    Raises:
        ConfigError: the configuration is that of another student than the run's.
        CheckpointError: the run holds no sound checkpoint, or one of another teacher or base.
    """
    shared(lambda: refuse_another_reading(config))
    config = config if explains else without_comparison(config)
    sources = choose_sources(config, trains=False)
    with uncounted("building the networks"):
        method = shared(lambda: make_method(config, sources, trains=False))
    finder = Checkpoints(config.directory / CHECKPOINTS)
    path, rule = shared(lambda: choose(finder, config.score.checkpoint))
    # The student may score other data than it was trained on, but only with its own base, and
    # beside its own teacher, if beside any.
    there = finder.manifest(path)["identity"]
    given = {name: there[name] for name in ("data", "teacher") if name in there}
    identity = given | frozen_weights(method)
    state = Checkpoints(finder.directory, identity).load(path, Tensors(method.student))
    method.requires_grad_(False)
    return Trained(method.eval(), state.step, rule)


def saved_tensors(config: RunConfig, step: int) -> dict[str, Tensor]:
    """The student's tensors by their names there, read from the files of a verified checkpoint.

    Frozen parameters are not among them. Not collective.
    """
    path = config.directory / CHECKPOINTS / step_name(step)
    stored, reader = open_checkpoint(path, read_manifest(path)["files"])
    of_student = {name: entry for name, entry in stored.items() if name.startswith(STUDENT)}
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in of_student.items()
    }
    read_into(tensors, reader)
    return {name.removeprefix(STUDENT): tensor for name, tensor in tensors.items()}


def start_from(path: Path, method: Method) -> None:
    """Gives a student the weights of a named checkpoint, once each of its files is verified.

    Raises:
        CheckpointError: it is damaged, of another student, or of another teacher or base.
    """
    verify(path, shown=rank_here() == 0)
    identity = {"data": read_manifest(path)["identity"]["data"], **frozen_weights(method)}
    student = Tensors(method.student)
    body = Checkpoints(path.parent, identity).check(path, student)
    student.read(path, body["files"])


def choose(checkpoints: Checkpoints, wanted: str) -> tuple[Path, str]:
    """The wanted checkpoint, and the rule by which it was chosen."""
    if wanted == "best":
        path = checkpoints.best()
        if path is not None:
            return path, "lowest loss on held-out images"
        log.warning("no checkpoint has a loss on held-out images: the last one is used")
    path = checkpoints.latest()
    if path is None:
        raise CheckpointError(
            f"{checkpoints.directory} holds no sound checkpoint",
            "train the run first, until it has saved one",
        )
    return path, "last"


def is_one_checkpoint(config: RunConfig) -> bool:
    """Whether the selected checkpoint of a run is also its last; the same on all processes."""
    finder = Checkpoints(config.directory / CHECKPOINTS)
    return choose(finder, "best")[0] == choose(finder, "last")[0]


def save_standard(folder: Path, standard: Standard, config: RunConfig, step: int) -> None:
    """Keeps what normal maps look like beside the scores that were made with it."""
    tensors = {"mean": standard.mean.cpu(), "deviation": standard.deviation.cpu()}
    files.write_bytes(folder / STANDARD, save(tensors, _belonging(config, step)))


def load_standard(config: RunConfig, step: int) -> Standard | None:
    """What normal maps of this checkpoint look like, where the configuration asks for it.

    Raises:
        DataError: scoring the test split has not kept it, or was of another checkpoint or reading.
    """
    if not config.score.standardise:
        return None
    path = scores_folder(config) / STANDARD
    remedy = f"run `{kdad('score', config.directory)}` with the same words first"
    if not path.is_file():
        raise DataError(f"score.standardise needs {path}, which is not there", remedy)
    try:
        with safe_open(path, "pt") as file:
            found, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy) from None
    wanted = _belonging(config, step)
    if found != wanted:
        raise DataError(f"score.standardise: {path} is of {found}; this is {wanted}", remedy)
    return Standard(**tensors)


def _belonging(config: RunConfig, step: int) -> dict[str, str]:
    """What the maps of normal images depend on, beside the run itself."""
    return {"step": str(step), "readout": readout_of(config)}
