"""Holds the targets of a whole run on the training device, as they are stored, and gathers batches there by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.residency import available_memory, refuse_too_large
from cache.selected_array import SelectedArray
from data.geometry import View
from pipeline.byte_progress import megabytes

# Images copied at once, through one buffer.
_AT_ONCE = 64


class DeviceArrays:
    """Every array of the run's images in all its views, on one device.

    Raises UsageError where they would take more than nine tenths of what is free there: training needs some too.
    """

    def __init__(self, arrays: Mapping[str, SelectedArray], device: torch.device) -> None:
        needed = sum(array.num_bytes for array in arrays.values())
        free = free_memory(device)
        refuse_too_large("device", needed, None if free is None else free * 9 // 10)
        self._device = device
        self._num_images = max((array.num_images for array in arrays.values()), default=0)
        self._views = {name: list(array.places) for name, array in arrays.items()}
        self._rows: dict[str, Tensor] = {}
        with megabytes(f"copying targets to {device}", needed) as advance:
            for name, array in arrays.items():
                empty = torch.from_numpy(np.empty((0, *array.sample_shape), dtype=array.dtype))
                shape = (len(array.places) * array.num_images, *array.sample_shape)
                rows = self._rows[name] = torch.empty(shape, dtype=empty.dtype, device=device)
                for start, piece in _pieces(array):
                    rows[start : start + len(piece)] = torch.from_numpy(piece).to(device)
                    advance(piece.nbytes)
                array.close()

    def gather(self, positions: Sequence[int], views: Sequence[View]) -> dict[str, Tensor]:
        """Return image positions[i] in view views[i] for every i, [len(positions), …] by array name."""
        gathered = {}
        for name, rows in self._rows.items():
            order = self._views[name]
            index = [
                order.index(view) * self._num_images + position for position, view in zip(positions, views, strict=True)
            ]
            gathered[name] = rows.index_select(0, torch.tensor(index, device=self._device))
        return gathered


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, None where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def _pieces(array: SelectedArray) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the images, view after view, in pieces [m, …], each with the number of its first row; in one buffer."""
    buffer = np.empty((_AT_ONCE, *array.sample_shape), dtype=array.dtype)
    for number, view in enumerate(array.places):
        for start in range(0, array.num_images, _AT_ONCE):
            positions = range(start, min(start + _AT_ONCE, array.num_images))
            following = range(positions.stop, min(positions.stop + _AT_ONCE, array.num_images))
            array.prefetch(following, [view] * len(following))
            piece = array.gather(positions, [view] * len(positions), out=buffer[: len(positions)])
            yield number * array.num_images + start, piece
