"""The method of a configuration, with the classifiers of other runs that it starts from."""

from pathlib import Path

from kdad_dist.config import RunConfig, load_run
from kdad_dist.config_classkd import ClasskdConfig
from kdad_dist.errors import CheckpointError, ConfigError
from kdad_dist.methods import build_method
from kdad_dist.methods.base import Method
from kdad_dist.methods.classkd import build_student
from kdad_dist.models.backbone_classifier import KnownClassifier
from kdad_dist.models.discriminator import Rivals
from kdad_dist.runtime.identity import SOURCES, frozen_tensors
from kdad_dist.runtime.manifest import first_sound, published, ranked, read_manifest
from kdad_dist.runtime.tensors import Tensors


def make_method(config: RunConfig) -> Method:
    """As `build_method`; names in the configuration may be directories of runs. Not collective.

    Raises:
        As `build_method`; CheckpointError: such a run holds no sound checkpoint.
    """
    return build_method(config, open_run)


def open_run(run: Path) -> KnownClassifier:
    """The classifier of a run's best checkpoint (lowest loss on held-out images; without one, the
    newest), every file of it verified. Its own teacher is not needed. Not collective.

    Raises:
        ConfigError: it is no run, or not of classkd.
        CheckpointError: it holds no sound checkpoint, or its frozen weights are not what they were.
    """
    config = load_run(run)
    method, classes = config.method, config.data.classes
    if not isinstance(method, ClasskdConfig) or classes is None:
        raise ConfigError(
            f"{run} is a run of {method.name}, which is no classifier",
            "give the directory of a run of classkd",
        )
    data = config.data
    student = build_student(method, len(classes), data.image_size, config.seed, open_run)
    paths = published(run / "checkpoints")
    path = first_sound(ranked(paths)) or first_sound(reversed(paths))
    if path is None:
        raise CheckpointError(
            f"{run} holds no sound checkpoint", "train it first, until it has saved one"
        )
    body, tensors = read_manifest(path), Tensors(student)
    tensors.check(path, body["files"])
    if body["identity"].get("base") != frozen_tensors(student).get("base"):
        raise CheckpointError(
            f"{path} was trained on another base: {SOURCES['base']}",
            f"restore the file that method.network.weights of {run} names",
        )
    tensors.fill(path, body["files"])
    source = f"{run} (step {body['step']})"
    network = student.classifier if isinstance(student, Rivals) else student
    backbone, head = method.network.backbone, method.network.head
    return KnownClassifier(source, backbone, head, classes, network.state_dict())
