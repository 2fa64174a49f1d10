"""What runs will take: time by runs of the same kind that are finished, disk by the sizes of their checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from statistics import median

from pipeline.config import TrainConfig
from pipeline.sweep.claims import Claims
from pipeline.sweep.variants import Run

# Weights of the students as they are by default, neck, heads and 20 classes included; a test counts them.
PARAMETERS = {"resnet18": 19_476_827, "mobilenet_v3_small": 9_196_859, "vit_tiny": 13_974_843}
_FLOAT_BYTES = 4


class Estimates:
    """How long runs took, by what determines that."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, list[float]] = defaultdict(list)

    @classmethod
    def of(cls, finished: Iterable[Run], claims: Claims) -> Estimates:
        """Return what the claims tell of finished runs."""
        estimates = cls()
        for run in finished:
            notes = [note.seconds for note in claims.notes(run.name)]
            # Of a run that was killed on the way, nobody knows how long that sitting was.
            if notes and None not in notes:
                estimates.add(run.config, sum(seconds for seconds in notes if seconds is not None))
        return estimates

    def add(self, config: TrainConfig, seconds: float) -> None:
        """Note what a run took, from start to end."""
        self._seconds[_kind(config)].append(seconds)

    def seconds(self, config: TrainConfig) -> float | None:
        """Return what a run will take; None where none of its kind is finished."""
        found = self._seconds.get(_kind(config))
        return median(found) if found else None


def checkpoint_bytes(config: TrainConfig) -> int | None:
    """Return about what a run's two checkpoints take; None for a backbone whose size is not known."""
    parameters = PARAMETERS.get(config.student.backbone)
    if parameters is None:
        return None
    resolved = config.resolved().recipe
    # The latest holds weights and optimiser state (SGD: one momentum; AdamW: two moments), the best one weights.
    copies = 2 + (1 if resolved.optimizer == "sgd" else 2) + (1 if resolved.ema else 0)
    return parameters * copies * _FLOAT_BYTES


def _kind(config: TrainConfig) -> Hashable:
    """Return what a run's time depends on, within one sweep: not its seed, its losses' weights or its targets."""
    images = (config.voc_sets, config.limit, config.val_sets, config.test_sets)
    recipe = config.recipe
    return (config.student, images, recipe.epochs, recipe.batch_size, recipe.amp, config.evaluate)
