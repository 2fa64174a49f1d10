"""Commits shards behind the computation: teachers compute the next range while the last one is written."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cache.writer import MissingShard

Outputs = dict[str, NDArray[np.floating]]


class Committer(Protocol):
    """What a queue hands its items to: a `StoreWriter`, or what encodes in its own way before one."""

    def commit(self, missing: MissingShard, outputs: Outputs) -> None:
        """Write and commit one missing shard."""


class CommitQueue:
    """A thread that commits what is submitted, in order. Used as a context: leaving it waits for the last commit,
    also after an error or an interrupt: what teachers have computed is not thrown away.

    At most `depth` submissions wait, so memory does not depend on the store's size. After a failed commit nothing more
    is written, and the failure is raised by the next `submit` or on leaving.
    """

    def __init__(self, writer: Committer, depth: int = 2) -> None:
        self._writer = writer
        self._waiting: queue.Queue[tuple[MissingShard, Outputs] | None] = queue.Queue(maxsize=depth)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)

    def submit(self, missing: MissingShard, outputs: Outputs) -> None:
        """Hand over a range's outputs, which must not be changed afterwards; waits while the queue is full.

        Raises what an earlier commit raised.
        """
        self._raise_failure()
        self._waiting.put((missing, outputs))

    def finish(self) -> None:
        """Wait until all that was submitted is committed.

        Raises what a commit raised.
        """
        self._waiting.join()
        self._raise_failure()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.join()
        if error is None:
            self._raise_failure()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                # After a failure all is taken from the queue all the same, so that no `submit` waits for ever.
                if self._failure is None:
                    self._writer.commit(*item)
            except BaseException as failure:
                self._failure = failure
            del item
            self._waiting.task_done()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
