"""Loads batches in worker processes and hands their errors over in plain words.

A DataLoader re-raises a worker's exception with the worker's traceback as its message. Errors that are foreseen travel
as values instead and are raised here, whole.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from data.errors import TeachOnceError

Key = TypeVar("Key")
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def load_batches(
    load: Callable[[Key], Item],
    batches: Iterable[list[Key]],
    collate: Callable[[list[Item]], Loaded],
    *,
    workers: int,
    device: torch.device,
) -> BatchLoader[Key, Item, Loaded]:
    """Return an iterable over the loaded batches; workers live as long as it does.

    load: makes one item of a key.  batches: lists of keys, iterated anew for every pass.
    """
    return BatchLoader(load, batches, collate, workers, device)


class BatchLoader(Generic[Key, Item, Loaded]):
    """Iterates batches, raising the first error that a worker met; that ends it. Made by `load_batches`."""

    def __init__(
        self,
        load: Callable[[Key], Item],
        batches: Iterable[list[Key]],
        collate: Callable[[list[Item]], Loaded],
        workers: int,
        device: torch.device,
    ) -> None:
        self._loader = DataLoader(
            _Guarded(load),
            batch_sampler=_Batches(batches),
            collate_fn=_GuardedCollate(collate),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_the_run,
        )

    def __iter__(self) -> Iterator[Loaded]:
        for loaded in self._loader:
            if isinstance(loaded, TeachOnceError):
                # Whoever keeps the error keeps this frame, and with it the workers: a garbage collection would end
                # them later, and take five seconds for each.
                del self._loader
                raise loaded
            yield loaded


def _leave_interrupts_to_the_run(_: int) -> None:
    # Ctrl-C goes to the whole group of processes: the run ends after its step, and its workers with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Batches(Generic[Key]):
    """A batch sampler over any iterable of lists; torch asks for the class of its own only in its annotations."""

    def __init__(self, batches: Iterable[list[Key]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches)


class _Guarded(Dataset[Item], Generic[Key, Item]):
    def __init__(self, load: Callable[[Key], Item]) -> None:
        self._load = load

    def __getitem__(self, key: Key) -> Item | TeachOnceError:  # type: ignore[override]  # errors travel as values
        try:
            return self._load(key)
        except TeachOnceError as error:
            return error


class _GuardedCollate(Generic[Item, Loaded]):
    def __init__(self, collate: Callable[[list[Item]], Loaded]) -> None:
        self._collate = collate

    def __call__(self, items: list[Item | TeachOnceError]) -> Loaded | TeachOnceError:
        loaded: list[Item] = []
        for item in items:
            if isinstance(item, TeachOnceError):
                return item
            loaded.append(item)
        return self._collate(loaded)
