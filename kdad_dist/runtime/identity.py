"""What a checkpoint belongs to, though it does not hold it: known by hash, compared when loaded."""

from collections.abc import Mapping

from torch import Tensor, nn

from kdad_dist.errors import DataError
from kdad_dist.methods.base import Method
from kdad_dist.models.gather import rank_here
from kdad_dist.models.weights import tensors_hash
from kdad_dist.runtime.progress import progress
from kdad_dist.runtime.together import gathered, shared

SOURCES = {
    "data": "the content of data.shards",
    "teacher": "the weights of method.teacher",
    "base": "the student's weights that are not trained, from method.weights or method.network",
}
"""What the parts of an identity are hashes of."""


def frozen_weights(method: Method) -> dict[str, str]:
    """Hashes of the weights that a method needs and no checkpoint holds: the teacher's, and those
    of the student that are not trained nor derived from others, its "base".
    """
    hashes = frozen_tensors(method.student, method.derived)
    if method.teacher is not None:
        hashes["teacher"] = shown_hash(method.teacher.state_dict(), "the teacher")
    return hashes


def frozen_tensors(student: nn.Module, derived: frozenset[str] = frozenset()) -> dict[str, str]:
    """The hash of a student's "base"; nothing where all of it is trained."""
    base = {
        name: parameter
        for name, parameter in student.named_parameters()
        if not parameter.requires_grad and name not in derived
    }
    return {"base": shown_hash(base, "frozen weights")} if base else {}


def shown_hash(tensors: Mapping[str, Tensor], what: str) -> str:
    """The hash of tensors; it is shown how far that is, where it takes long."""
    title, shown = f"hashing {what}", rank_here() == 0
    with progress(title, len(tensors), "tensors", visible=shown, brief=True) as bar:
        return tensors_hash(tensors, bar.advance)


def refuse_others(identity: dict[str, str]) -> None:
    """Collective.

    Raises:
        DataError: on all processes, where one of them has read something else than the main one,
            of a disk of its own say.
    """
    found = gathered(identity)

    def check() -> None:
        for rank, other in enumerate(found):
            names = [
                what for name, what in SOURCES.items() if other.get(name) != found[0].get(name)
            ]
            if names:
                raise DataError(
                    f"process {rank} has read something else than process 0: {', '.join(names)}",
                    "give all machines the same files, or one disk that they share",
                )

    shared(check)
