"""What a sample is labelled as, by its class, and which samples are held out of the training."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kdad_dist.data.sample import Sample
from kdad_dist.errors import ConfigError
from kdad_dist.wording import meant


def as_normal(
    samples: list[Sample], normal_class: str | None, root: str, layout: str
) -> list[Sample]:
    """Samples labelled 0 where they are of the normal class, else 1; of a layout without classes,
    as they are.

    Raises:
        ConfigError: the class is unknown, missing or not wanted.
    """
    classes = classes_of(samples)
    if not classes:
        if normal_class is not None:
            raise ConfigError(
                f"data.normal_class is {normal_class!r}, but {root} has the layout "
                f"{layout!r}, whose samples carry no classes",
                "remove data.normal_class",
            )
        return samples
    if normal_class not in classes:
        found = "missing" if normal_class is None else f"{normal_class!r}, which is unknown"
        raise ConfigError(
            f"data.normal_class is {found}: {root} holds classes, of which one is normal",
            f"{meant(normal_class or '', classes)}choose from: {', '.join(classes)}",
        )
    return [
        replace(sample, gt_label=0, defect_type=None)
        if sample.class_name == normal_class
        else replace(sample, gt_label=1, defect_type=sample.class_name)
        for sample in samples
    ]


def as_classes(
    samples: list[Sample], classes: Sequence[str], root: str, layout: str
) -> list[Sample]:
    """The samples of these classes, each labelled with the place of its own among them.

    Raises:
        ConfigError: a class is unknown, or there are none.
    """
    known = classes_of(samples)
    if not known:
        raise ConfigError(
            f"classes are to be told apart, but {root} has the layout {layout!r}, whose samples "
            "carry none",
            "pack a folder of classes, CIFAR-10, MNIST or Fashion-MNIST, or choose a method that "
            "looks for anomalies",
        )
    if unknown := [name for name in classes if name not in known]:
        raise ConfigError(
            f"data.classes names {', '.join(map(repr, unknown))}, which {root} does not hold",
            f"{meant(unknown[0], known)}choose from: {', '.join(known)}",
        )
    place = {name: label for label, name in enumerate(classes)}
    return [replace(s, gt_label=place[s.class_name]) for s in samples if s.class_name in place]


def check_classes(
    samples: list[Sample], classes: Sequence[str] | None, root: str, layout: str
) -> None:
    """Refuses to learn labels without knowing of which classes, before anything is built.

    Raises:
        ConfigError: as `as_classes`; or they are not given: it says which there are.
    """
    known = classes_of(samples)
    if classes is None and known:
        raise ConfigError(
            "data.classes does not say which classes are to be told apart",
            f"set data.classes={json.dumps(known, ensure_ascii=False)}, or some of them; their "
            "order is that of the labels",
        )
    as_classes(samples, classes or [], root, layout)


def classes_of(samples: Iterable[Sample]) -> list[str]:
    """The names of all classes, sorted; none where samples carry none."""
    return sorted({sample.class_name for sample in samples if sample.class_name})


def held_out_keys(keys: Iterable[str], fraction: float) -> set[str]:
    """The keys whose hash falls into the first `fraction` of all hashes: each by itself, so that
    neither the order of the index nor another sample can move it.

    Of two samples or more, at least one is held out and at least one is not (where fraction > 0).
    """
    if fraction == 0:
        return set()
    position = {key: int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 2**64 for key in keys}
    held_out = {key for key, at in position.items() if at < fraction}
    if len(position) >= 2 and not held_out:
        held_out = {min(position, key=position.__getitem__)}
    if len(position) >= 2 and len(held_out) == len(position):
        held_out.discard(max(position, key=position.__getitem__))
    return held_out if len(position) >= 2 else set()
