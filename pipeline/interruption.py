"""Lets a run end between two steps when it is interrupted, so that what it saves is whole.

While images are scored an interruption ends the run at once: what was trained was saved before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.progress import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the run was asked to end. A second request ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first Ctrl-C, or a scheduler's SIGTERM, that comes in the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("interrupted: ending after this step, which is saved; once more ends at once")
