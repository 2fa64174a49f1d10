"""How close a student's image-level logits are to its teacher's, over a set of images.

Axes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.records import VOC_CLASSES

from .multilabel import PRESENT, multilabel_map

Divergence = Literal["kl", "binary"]


@dataclass(frozen=True)
class LogitAgreement:
    """Agreement of logits, as the run's logit loss measures it.

    divergence: `kl`, over the classes; `binary`, Bernoulli class by class, summed.  temperature: T.  kl: mean over the
    images, T² included as in the loss.  per_class: mean over the images that show the class; None where none does.
    top1: share of images whose highest class is the same.  …_shuffled: against another image's teacher.
    student_map, teacher_map: multi-label mAP of the logits against the annotations; None where no image shows any.
    kl is None, and so are per_class and kl_shuffled, where the head was not trained to give the teacher's logits.
    """

    divergence: Divergence
    temperature: float
    kl: float | None
    kl_shuffled: float | None
    per_class: dict[str, float | None] | None
    top1: float
    top1_shuffled: float | None
    student_map: float | None
    teacher_map: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def softened_kl(
    student: NDArray[np.floating], teacher: NDArray[np.floating], temperature: float
) -> NDArray[np.float64]:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of each image, [N], for logits [N, K].

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    log_student, log_teacher = _log_softmax(student / temperature), _log_softmax(teacher / temperature)
    return np.asarray(temperature**2 * (np.exp(log_teacher) * (log_teacher - log_student)).sum(axis=1))


def bernoulli_kl(
    student: NDArray[np.floating], teacher: NDArray[np.floating], temperature: float
) -> NDArray[np.float64]:
    """Return T² · Σ over classes of KL(Bernoulli(teacher) ‖ Bernoulli(student)) of each image, [N].

    student, teacher: logits [N, K], of which sigmoid(logit / T) is the probability; the teacher's are centred already.
    """
    s, t = (logits.astype(np.float64) / temperature for logits in (student, teacher))
    probability = np.exp(-np.logaddexp(0.0, -t))
    # log σ(t) − log σ(s), and the same of 1 − σ, which is σ(−t).
    present = np.logaddexp(0.0, -s) - np.logaddexp(0.0, -t)
    absent = np.logaddexp(0.0, s) - np.logaddexp(0.0, t)
    return np.asarray(temperature**2 * (probability * present + (1 - probability) * absent).sum(axis=1))


def logit_agreement(
    student: NDArray[np.floating],
    teacher: NDArray[np.floating],
    presence: NDArray[np.int8],
    *,
    divergence: Divergence,
    temperature: float,
    order: NDArray[np.intp] | None,
    taught: bool = True,
) -> LogitAgreement:
    """Return how student and teacher logits [N, 20] agree.

    teacher: centred where the divergence is binary.  presence: as `presence_matrix` gives it.  order: whose teacher
    each image gets when shuffled.  taught: whether the head was trained to give the teacher's logits; else no KL.
    """
    measure = {"kl": softened_kl, "binary": bernoulli_kl}[divergence]
    kl = measure(student, teacher, temperature)
    shown = presence == PRESENT
    per_class = {
        name: float(kl[rows].mean()) if rows.any() else None for name, rows in zip(VOC_CLASSES, shown.T, strict=True)
    }

    def same_highest(other: NDArray[np.floating]) -> float:
        return float((student.argmax(axis=1) == other.argmax(axis=1)).mean())

    return LogitAgreement(
        divergence=divergence,
        temperature=temperature,
        kl=float(kl.mean()) if taught else None,
        kl_shuffled=float(measure(student, teacher[order], temperature).mean())
        if taught and order is not None
        else None,
        per_class=per_class if taught else None,
        top1=same_highest(teacher),
        top1_shuffled=None if order is None else same_highest(teacher[order]),
        student_map=multilabel_map(student, presence)[0],
        teacher_map=multilabel_map(teacher, presence)[0],
    )


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
