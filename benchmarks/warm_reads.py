"""Random reads when everything is in the page cache: what a second epoch costs.

The pages are those that writing left there. How a file was written shows: the kernel keeps what came in large writes in
large pages, and the processor reads those faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.contenders import Features, Formats, Gather
from benchmarks.rounds import Pass, Rows, in_turn, random_batches, timed
from benchmarks.stores import SAMPLE_SHAPE, reader_of
from benchmarks.tables import Figure, Table, time_table

BATCH_SIZE = 8


def warm_tables(formats: Formats, rounds: int) -> list[Table]:
    """Return the tables of random batches of 8 and of random single samples."""
    batches, singles = WarmPasses(formats.samples, BATCH_SIZE), WarmPasses(formats.samples, 1)
    for contender in (formats.ours(), *formats.others()):
        gather = contender.open()
        batches.add(contender.name, gather, contender.at_least)
        singles.add(contender.name, gather, contender.at_least)
    batches.add_opening("ours, first touch: open, map, check", formats.ours().open)
    reader = reader_of(formats.store)
    singles.add("ours, a view, nothing copied", lambda rows, out: reader.read(rows[0]))
    return [
        time_table("Warm: random batches of 8", batches.figures(rounds)),
        time_table("Warm: one random sample at a time", singles.figures(rounds)),
    ]


class WarmPasses:
    """Passes over all samples in batches of one size, into one buffer that all of them use again and again."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._out = np.ones((batch_size, *SAMPLE_SHAPE), dtype="<f2")  # not zeros: its pages exist before the clock
        self._passes: dict[str, Pass] = {}
        self._targets: dict[str, float | None] = {}

    def add(self, name: str, gather: Gather, at_least: float | None = None) -> None:
        """Add a contender that is open already."""
        self.add_opening(name, lambda: gather, at_least)

    def add_opening(self, name: str, open_gather: Callable[[], Gather], at_least: float | None = None) -> None:
        """Add a contender that is opened anew, on the clock, for every pass."""
        samples, batch_size, out = self._samples, self._batch_size, self._out  # no cycle: it would keep files mapped

        def run(number: int) -> float:
            batches = random_batches(samples, batch_size, number)
            return timed(lambda: gather_all(open_gather(), batches, out)) / samples

        self._passes[name], self._targets[name] = run, at_least

    def figures(self, rounds: int) -> list[Figure]:
        """Return the figures of that many rounds, after one that does not count."""
        found = in_turn(self._passes, rounds + 1)
        return [Figure(name, seconds[1:], self._targets[name]) for name, seconds in found.items()]


def gather_all(gather: Gather, batches: Iterable[Rows], out: Features) -> None:
    """Gather batch after batch into one buffer."""
    for rows in batches:
        gather(rows, out[: len(rows)])
