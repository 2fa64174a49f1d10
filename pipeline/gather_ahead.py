"""Gathers the targets of coming batches in a thread of the training process, while the step before them computes.

A store gives a batch in far less time than a step takes, and a copy releases the interpreter: one thread is enough, and
no worker process has to send anything. Nothing is drawn or computed here, so no result depends on it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache.selected_array import SelectedArray
from pipeline.dataset import SampleKey

# Sets of buffers: one that the step reads, one that is being filled, and two that are ready.
BUFFERS = 4
# How many batches before they are gathered the disk is asked for them: some 50 MB at batch 8.
AHEAD = 8


@dataclass
class Buffers:
    """Room for one batch of every array, [batch size, …], which is used again once it was copied.

    copied: on a GPU, the event after its last copy to the device.
    """

    host: dict[str, Tensor]
    copied: torch.cuda.Event | None

    def fill(self, arrays: Mapping[str, SelectedArray], keys: Sequence[SampleKey], positions: Sequence[int]) -> None:
        """Gather the targets at these positions for a batch, as soon as nothing reads what was there."""
        if self.copied is not None:
            self.copied.synchronize()
        views = [key.view for key in keys]
        for name, array in arrays.items():
            array.gather(positions, views, out=self.host[name][: len(keys)].numpy())

    def on(self, device: torch.device, count: int) -> dict[str, Tensor]:
        """Return the first `count` rows on the device: on the CPU as they are here, without a copy."""
        moved = {name: rows[:count].to(device, non_blocking=True) for name, rows in self.host.items()}
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(device))
        return moved


class GatherAhead:
    """The targets of a sequence of batches, in order, gathered ahead. Close it to end its thread.

    place: whose targets each image gets, by its index; its own where None.

    The thread starts at the first `take`: by then a loader has forked its workers.
    """

    def __init__(
        self,
        arrays: Mapping[str, SelectedArray],
        batches: Sequence[Sequence[SampleKey]],
        device: torch.device,
        place: Sequence[int] | None = None,
    ) -> None:
        self._place = place
        self._arrays = arrays
        self._batches = batches
        self._device = device
        self._free: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Sequence[SampleKey], Buffers] | BaseException] = queue.SimpleQueue()
        self._in_use: Buffers | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        for keys in batches[:AHEAD]:
            self._prefetch(keys)

    def take(self, keys: Sequence[SampleKey]) -> dict[str, Tensor]:
        """Return the arrays of the next batch, [len(keys), …] on the device, valid until the next `take`.

        keys: of that batch.  Raises what gathering it raised.
        """
        if self._thread is None:
            self._start()
        elif self._in_use is not None:
            self._free.put(self._in_use)
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)
            raise ready
        expected, self._in_use = ready
        assert tuple(expected) == tuple(keys), "batches were not asked for in their order"
        return self._in_use.on(self._device, len(keys))

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        if self._thread is not None:
            self._free.put(Buffers({}, None))  # it may be waiting for room
            self._thread.join()

    def _start(self) -> None:
        size = max(len(keys) for keys in self._batches)
        for _ in range(BUFFERS):
            self._free.put(self._new_buffers(size))
        self._thread = threading.Thread(target=self._run, name="gather-targets", daemon=True)
        self._thread.start()

    def _new_buffers(self, size: int) -> Buffers:
        host = {
            name: torch.from_numpy(np.zeros((size, *array.sample_shape), dtype=array.dtype))
            for name, array in self._arrays.items()
        }
        if self._device.type != "cuda":
            return Buffers(host, None)
        # Page-locked memory is copied without the host's help; a waiting thread sleeps instead of turning in circles.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        return Buffers({name: rows.pin_memory() for name, rows in host.items()}, copied)

    def _run(self) -> None:
        try:
            for number, keys in enumerate(self._batches):
                for later in self._batches[number + AHEAD : number + AHEAD + 1]:
                    self._prefetch(later)
                buffers = self._free.get()
                if self._closed:
                    return
                buffers.fill(self._arrays, keys, self._positions(keys))
                self._ready.put((keys, buffers))
        except BaseException as error:  # whatever it is, the training thread raises it
            self._ready.put(error)

    def _prefetch(self, keys: Sequence[SampleKey]) -> None:
        positions, views = self._positions(keys), [key.view for key in keys]
        for array in self._arrays.values():
            array.prefetch(positions, views)

    def _positions(self, keys: Sequence[SampleKey]) -> list[int]:
        return [key.index if self._place is None else self._place[key.index] for key in keys]
