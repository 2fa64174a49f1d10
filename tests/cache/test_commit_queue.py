from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cache.commit_queue import CommitQueue
from cache.writer import MissingShard, StoreWriter, open_writer
from data.errors import StoreWriteError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def test_what_is_submitted_is_committed_in_order(stores: TinyStores, whole_store: Path, tree_of: Any) -> None:
    order: list[MissingShard] = []
    with open_writer(stores.folder / "store.zarr", stores.plan()) as writer:
        real = writer.commit
        writer.commit = lambda missing, outputs: (order.append(missing), real(missing, outputs))[1]  # type: ignore[method-assign]
        submitted = writer.missing()
        with CommitQueue(writer) as commits:
            for missing in submitted:
                commits.submit(missing, stores.outputs(missing))
        assert writer.missing() == []
    assert order == submitted
    assert tree_of(stores.folder / "store.zarr") == tree_of(whole_store)


class Slow:
    """A writer whose commits wait for leave, and count."""

    def __init__(self) -> None:
        self.leave = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.committed: list[Any] = []

    def commit(self, missing: Any, outputs: Any) -> None:
        self.begun.release()
        self.leave.acquire()
        if outputs == "bad":
            raise StoreWriteError("the disk is full")
        self.committed.append(missing)


def queue_of(slow: Slow, depth: int) -> CommitQueue:
    writer: StoreWriter = slow  # type: ignore[assignment]
    return CommitQueue(writer, depth)


def test_no_more_than_the_depth_waits() -> None:
    slow, submitted = Slow(), []
    with queue_of(slow, depth=2) as commits:

        def submit_all() -> None:
            for number in range(5):
                commits.submit(number, {})  # type: ignore[arg-type]
                submitted.append(number)

        other = threading.Thread(target=submit_all)
        other.start()
        slow.begun.acquire()
        other.join(timeout=0.3)
        assert submitted == [0, 1, 2]  # one is being written, two wait, the fourth may not be handed over
        for _ in range(5):
            slow.leave.release()
        other.join()
    assert slow.committed == [0, 1, 2, 3, 4]


def test_a_failed_commit_is_raised_and_nothing_after_it_is_written() -> None:
    slow = Slow()
    slow.leave.release(10)

    def submit_all() -> None:
        with queue_of(slow, depth=1) as commits:
            for number in range(100):
                commits.submit(number, "bad" if number == 1 else {})  # type: ignore[arg-type]

    with pytest.raises(StoreWriteError, match="the disk is full"):
        submit_all()
    assert slow.committed == [0]


def test_a_failure_of_the_last_commit_is_raised_on_leaving() -> None:
    slow = Slow()
    slow.leave.release(1)
    with pytest.raises(StoreWriteError, match="the disk is full"), queue_of(slow, depth=1) as commits:
        commits.submit(0, "bad")  # type: ignore[arg-type]


def test_what_was_computed_is_written_also_when_the_computation_fails(stores: TinyStores) -> None:
    with open_writer(stores.folder / "store.zarr", stores.plan()) as writer:
        first, second, *rest = writer.missing()

        def interrupted() -> None:
            with CommitQueue(writer) as commits:
                commits.submit(first, stores.outputs(first))
                commits.submit(second, stores.outputs(second))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert writer.missing() == rest
