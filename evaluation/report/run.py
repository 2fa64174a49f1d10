"""What a report knows of one training run, free of files and of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.detections import Detections


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures. number: from 1.  losses: means over the images.  mean_ap, ap50: None where not scored."""

    number: int
    losses: Mapping[str, float]
    mean_ap: float | None
    ap50: float | None


@dataclass(frozen=True)
class Times:
    """Where a run's seconds went. epochs: training of each.  images: of one epoch.  device: what trained."""

    training: float
    data_wait: float
    targets: float
    epochs: tuple[float, ...]
    images: int
    device: str


@dataclass(frozen=True)
class Teacher:
    """A teacher that was distilled. roles: `features`, `logits`, `regions`.  identity: its settings, as text."""

    key: str
    roles: tuple[str, ...]
    untrained: bool
    identity: Mapping[str, str]


@dataclass(frozen=True)
class Store:
    """A teacher cache that a run read. arrays: path, shape and dtype of each array that was read."""

    path: str
    fingerprint: str
    arrays: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    arm: what it distilled, in words.  random_weights: whether its backbone started from none.  config: every setting
    as text, by dotted name.  control: what makes it a control arm, in words, or nothing.  best_epoch, best_mean_ap: by
    validation mAP.  same_images: whether the images reported on are those that chose it.  detections: what its last
    epoch's student found in the images reported on.
    """

    name: str
    arm: str
    backbone: str
    random_weights: bool
    seed: int
    num_epochs: int
    config: Mapping[str, str]
    control: str
    history: tuple[Epoch, ...]
    best_epoch: int
    best_mean_ap: float | None
    times: Times
    teachers: tuple[Teacher, ...]
    stores: tuple[Store, ...]
    same_images: bool
    detections: Detections

    @property
    def untrained(self) -> tuple[str, ...]:
        """The teachers that were never trained."""
        return tuple(teacher.key for teacher in self.teachers if teacher.untrained)
