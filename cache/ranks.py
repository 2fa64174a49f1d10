"""Several processes that write one store: what they need of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from data.errors import StoreWriteError, TeachOnceError

T = TypeVar("T")


class Ranks(Protocol):
    """A process's place among those that write a store together: `rank` of `size`, counted from 0."""

    @property
    def rank(self) -> int:
        """The process's number; rank 0 alone locks, creates, sweeps and merges."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def exchange(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order; waits until all have come."""


class _Alone:
    """One process writes the store."""

    rank = 0
    size = 1

    def exchange(self, value: Any) -> list[Any]:
        """Return the one value there is."""
        return [value]


ALONE: Ranks = _Alone()


def exchange(ranks: Ranks, value: Any) -> list[Any]:
    """Return every rank's value, in rank order; raises StoreWriteError where another rank is gone."""
    try:
        return ranks.exchange(value)
    except TeachOnceError:
        raise
    except Exception as error:  # each means of communication has its own
        raise StoreWriteError(
            f"rank {ranks.rank}: another rank is gone ({error})",
            hint="what was committed is intact: start all ranks again with the same command to resume",
        ) from error


def by_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Return, on every rank, what the work returned on rank 0, the only one that does it; or raise what it raised."""
    result, failure = None, None
    if ranks.rank == 0:
        try:
            result = work()
        except TeachOnceError as error:
            failure = error
        except BaseException as error:
            exchange(ranks, (None, StoreWriteError(f"rank 0 failed: {error!r}")))
            raise
    said: tuple[T, TeachOnceError | None] = exchange(ranks, (result, failure))[0]
    if said[1] is not None:
        raise said[1]
    return said[0]
