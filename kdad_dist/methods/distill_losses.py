"""What a student classifier may learn of a teacher, on logits: pure functions, one value per image.

Hinton et al., *Distilling the knowledge in a neural network*, 2015; Park et al., *Relational
knowledge distillation*, CVPR 2019; Goodfellow et al., *Generative adversarial nets*, 2014.
Relations are those of the logits: an output that both networks have, and that is trained whatever
is frozen. Student and teacher stand in the same space.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdad_dist.models.gather import Rows


def softened(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, " b"]:
    """T^2 KL(teacher || student) of the probabilities at temperature T, summed over classes.

    T^2 keeps the gradient as large as that of cross-entropy, whatever T is.
    """
    found = F.log_softmax(student / temperature, dim=1)
    wanted = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence


def unconvinced(verdict: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-log D(student), where D is the probability of which `verdict` is the logit: what a student
    minimises (the form of section 3 that does not vanish while D is sure).

    Binary cross-entropy, and no difference of verdicts ("Wasserstein"), which says something only
    of a discriminator whose slope is bounded; nothing bounds the slope of this one.
    """
    return F.softplus(-verdict)


def mistaken(
    on_student: Float[Tensor, " b"], on_teacher: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """The mean of -log(1 - D(student)) and -log D(teacher): what a discriminator minimises (eq. 1);
    log 2 where it cannot tell them apart.
    """
    return (F.softplus(on_student) + F.softplus(-on_teacher)) / 2


def distance_relations(student: Rows, teacher: Rows) -> Float[Tensor, " b"]:
    """Of each own image, the Huber loss of its distances to all images, in units of the mean
    distance; averaged over images it is the mean over all ordered pairs (eq. 5 to 7).
    """
    wanted, found = (_distances(rows.every) for rows in (teacher, student))
    return F.smooth_l1_loss(found[student.own], wanted[teacher.own], reduction="none").mean(dim=1)


def angle_relations(student: Rows, teacher: Rows) -> Float[Tensor, " b"]:
    """Of each own image, the Huber loss of the cosines of the angles at it between all pairs of
    images; averaged over images it is the mean over all ordered triples (eq. 8 to 10).
    """
    wanted, found = _cosines(teacher), _cosines(student)
    return F.smooth_l1_loss(found, wanted, reduction="none").mean(dim=(1, 2))


def _distances(rows: Float[Tensor, "n k"]) -> Float[Tensor, "n n"]:
    """Euclidean, divided by the mean of those that are not zero; the images of a batch of one, or
    of equal ones, have none.
    """
    squares = (rows[:, None] - rows[None]).square().sum(dim=2)
    apart = squares > 0
    # Where the root has no slope, its argument is a constant.
    distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / mean.clamp_min(torch.finfo(distances.dtype).tiny)


def _cosines(rows: Rows) -> Float[Tensor, "b n n"]:
    """At each own image, between the directions to any two; 0 where one of them is the image."""
    directions = F.normalize(rows.every[None] - rows.every[rows.own, None], dim=2)
    # Relations differ in digits that bf16 does not have: autocast shall not touch the product.
    # Where only shapes are computed (torch's meta device), there is none to keep away.
    device = "cpu" if directions.is_meta else directions.device.type
    with torch.autocast(device, enabled=False):
        return directions @ directions.transpose(1, 2)
