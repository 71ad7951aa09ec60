"""The method of a configuration, with the classifiers of other runs that it starts from."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from kdad_dist import files
from kdad_dist.config.classkd import ClassifierConfig, ClasskdConfig, ClassTeacherConfig
from kdad_dist.config.load import load_run
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import CheckpointError, ConfigError, WeightsError
from kdad_dist.methods import build_method
from kdad_dist.methods.base import Method
from kdad_dist.methods.classkd import build_student
from kdad_dist.models.backbone_classifier import KnownClassifier
from kdad_dist.models.discriminator import Rivals
from kdad_dist.models.gather import rank_here
from kdad_dist.runtime.identity import SOURCES, frozen_tensors
from kdad_dist.runtime.manifest import (
    first_sound,
    published,
    ranked,
    read_manifest,
    verify,
)
from kdad_dist.runtime.rundir import CHECKPOINTS, STATUS_FILE
from kdad_dist.runtime.tensors import Tensors
from kdad_dist.runtime.together import gathered, shared
from kdad_dist.wording import kdad

log = logging.getLogger(__name__)
Sources = Mapping[Path, Path]
"""By the directory of a run, the checkpoint that is taken of it."""


def choose_sources(config: RunConfig, trains: bool) -> Sources:
    """The checkpoints that `make_method` needs. Collective, as `choose_checkpoints`.

    Args:
        trains: whether the student is trained, or has been.
    """
    if not isinstance(config.method, ClasskdConfig):
        return {}
    method = config.method if trains else finished(config.method)
    if not trains and method.explain:
        shared(lambda: refuse_absent(method))
    return choose_checkpoints(method.network, method.teacher if trains or method.explain else None)


def make_method(config: RunConfig, sources: Sources, trains: bool) -> Method:
    """As `build_method`; names in the configuration may be directories of runs. Not collective.

    Args:
        trains: whether the student is trained. Of one that has been, initial weights that its
            checkpoint replaces are drawn, and a teacher that it does not look at any more is left
            out: it can be used wherever those of a training are not at hand.

    Raises:
        As `build_method` and `open_run`.
    """
    opened, teacher = partial(open_run, sources=sources), True
    if not trains and isinstance(config.method, ClasskdConfig):
        teacher = config.method.explain
        config = replace(config, method=finished(config.method))
    return build_method(config, opened, teacher)


def finished(method: ClasskdConfig) -> ClasskdConfig:
    """Of a student that has been trained: no initial weights that its checkpoint holds anyway."""
    if method.network.freeze != "none":
        return method
    return replace(method, network=replace(method.network, weights="random"))


def without_comparison(config: RunConfig) -> RunConfig:
    """Of who asks a student alone, whatever scoring its test images compares it with."""
    if not isinstance(config.method, ClasskdConfig):
        return config
    return replace(config, method=replace(config.method, explain=False, beside=None))


def refuse_absent(method: ClasskdConfig) -> None:
    """Raises WeightsError where one with whom a trained student is compared is gone."""
    others = {"teacher": method.teacher, "beside": method.beside}
    gone = [
        f"method.{name}.weights={other.weights}"
        for name, other in others.items()
        if other is not None and not Path(other.weights).exists()
    ]
    if gone:
        raise WeightsError(
            f"what the student looks at is compared with classifiers that are not there: "
            f"{', '.join(gone)}",
            "name where they are now, or score without comparing: method.explain=false "
            "method.beside=null",
        )


def choose_checkpoints(*named: ClassifierConfig | ClassTeacherConfig | None) -> Sources:
    """The best checkpoint (lowest loss on held-out images; without one, the newest) of each run
    that is named, and of those that these start from.

    Collective where processes are connected: the main one chooses for all, since a network disk may
    show others something else.

    Raises:
        ConfigError: one is no run, not of classkd, or has not come to its end.
    """
    found: dict[Path, Path] = {}

    def choose(config: ClassifierConfig | ClassTeacherConfig) -> None:
        run = Path(config.weights)
        if not run.is_dir() or run in found:
            return
        method = finished(read_classifier(run)[1])
        refuse_unfinished(run)
        paths = published(run / CHECKPOINTS)
        path = first_sound(ranked(paths)) or first_sound(reversed(paths))
        if path is not None:
            log.info("%s: its step %d is taken", run, read_manifest(path)["step"])
            found[run] = path
        choose(method.network)

    def choose_all() -> Sources:
        for config in named if rank_here() == 0 else ():
            if config is not None:
                choose(config)
        return found

    return gathered(shared(choose_all))[0]


def refuse_unfinished(run: Path) -> None:
    """Raises ConfigError where a run says that it has not come to its end."""
    status = files.read_json(run / STATUS_FILE)
    if status.get("state", "finished") != "finished":
        raise ConfigError(
            f"{run} has not finished: it is {status['state']}, at step {status.get('step')} of "
            f"{status.get('steps')}",
            f"finish it first, or give what `{kdad('export', run)}` writes of it now",
        )


def read_classifier(run: Path) -> tuple[RunConfig, ClasskdConfig, list[str]]:
    """The configuration of a run, its method, and the classes that it tells apart.

    Raises:
        ConfigError: it is no run, or not of classkd.
    """
    config = load_run(run)
    method, classes = config.method, config.data.classes
    if not isinstance(method, ClasskdConfig) or classes is None:
        raise ConfigError(
            f"{run} is a run of {method.name}, which is no classifier",
            "give the directory of a run of classkd",
        )
    return config, method, classes


def open_run(run: Path, sources: Sources) -> KnownClassifier:
    """The classifier of a run's chosen checkpoint, every file of it verified. Its own teacher is
    not needed. Not collective.

    Raises:
        ConfigError: it is no run, or not of classkd.
        CheckpointError: it holds no sound checkpoint, or its frozen weights are not what they were.
    """
    config, method, classes = read_classifier(run)
    method, path = finished(method), sources.get(run)
    if path is None:
        raise CheckpointError(
            f"{run} holds no sound checkpoint that the main process sees",
            "train it first, until it has saved one",
        )
    if rank_here():
        verify(path)  # the main process has, but this one may see another disk
    opened = partial(open_run, sources=sources)
    student = build_student(method, len(classes), config.data.image_size, config.seed, opened)
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
