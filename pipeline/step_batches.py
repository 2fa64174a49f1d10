"""What one process loads of every step of an epoch: its share of the images, in parts."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.dataset import EpochBatches, SampleKey

Part = list[SampleKey]


class StepBatches:
    """An epoch's steps for one process of several. Iterated, it yields the parts that are not empty, for a loader.

    parts: into which a step is cut.  first_step: of the epoch; set to go on within one.
    """

    def __init__(self, batches: EpochBatches, *, parts: int = 1, rank: int = 0, ranks: int = 1) -> None:
        self._batches = batches
        self._parts = parts
        self._rank = rank
        self._ranks = ranks
        self.first_step = 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return self._batches.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._batches.epoch = epoch

    def whole(self) -> list[Part]:
        """Return the epoch's batches over all processes."""
        return list(self._batches)

    def steps(self) -> list[tuple[int, list[Part]]]:
        """Return for every step the number of its images over all processes, and this one's parts, empty ones too."""
        steps = []
        for keys in list(self._batches)[self.first_step :]:
            mine = keys[self._rank :: self._ranks]
            steps.append((len(keys), [mine[part :: self._parts] for part in range(self._parts)]))
        return steps

    def __iter__(self) -> Iterator[Part]:
        return (part for _, parts in self.steps() for part in parts if part)
