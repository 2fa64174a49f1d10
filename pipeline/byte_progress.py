"""Progress of work that is counted in bytes, shown in megabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.progress import progress


@contextmanager
def megabytes(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of a block that tells, piece by piece, how many bytes it did; megabytes begun count as done."""
    done = 0
    with progress(what, _begun(total_bytes), "MB") as tick:

        def advance(num_bytes: int) -> None:
            nonlocal done
            before, done = done, done + num_bytes
            tick(_begun(done) - _begun(before))

        yield advance


def _begun(num_bytes: int) -> int:
    return -(-num_bytes // 1_000_000)
