"""One array for the images of a run, wherever each of them lies: rows of several readers behind one position an image.

Axes: n images of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.reader import ArrayReader, buffer
from data.geometry import View


@dataclass(frozen=True)
class ViewPlaces:
    """Where one view of one array lies: the readers, and for each image which of them has it, and in which row.

    stores: number of each reader's store.  reader, row: [n].
    """

    stores: tuple[int, ...]
    readers: tuple[ArrayReader, ...]
    reader: NDArray[np.int16]
    row: NDArray[np.int64]


class SelectedArray:
    """One teacher's array for the run's images, over several views: each row of a batch may come from another view.

    Not safe to use from two threads at once.
    """

    def __init__(self, places: Mapping[View, ViewPlaces]) -> None:
        self.places = dict(places)
        self._layout = next(iter(places.values())).readers[0].layout

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """All axes but the first."""
        return self._layout.sample_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return self._layout.numpy_dtype

    @property
    def num_images(self) -> int:
        """Number of images of the run."""
        return len(next(iter(self.places.values())).row)

    @property
    def num_bytes(self) -> int:
        """Bytes of the run's images in all views, without checksums."""
        return self.num_images * len(self.places) * self._layout.sample_bytes

    def gather(self, positions: Sequence[int], views: Sequence[View], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return image positions[i] in view views[i] for every i, copied, as [len(positions), *sample_shape].

        out: a buffer of that shape to fill instead of a new one.  Raises StoreCorruptError where a checksum fails.
        """
        out = buffer(self._layout, len(positions), out)
        for number, (position, view) in enumerate(zip(positions, views, strict=True)):
            places = self.places[view]
            places.readers[places.reader.item(position)].copy(places.row.item(position), out, number)
        return out

    def prefetch(self, positions: Sequence[int], views: Sequence[View]) -> None:
        """Ask the kernel to read these images in these views from the disk, in the background."""
        for position, view in zip(positions, views, strict=True):
            places = self.places[view]
            places.readers[places.reader.item(position)].prefetch([places.row.item(position)])

    def shards(self) -> Iterator[tuple[ArrayReader, int]]:
        """Yield every shard that holds an image of the run, with its reader."""
        for places in self.places.values():
            for number, reader in enumerate(places.readers):
                rows = places.row[places.reader == number]
                for shard in sorted(set((rows // reader.layout.shard_samples).tolist())):
                    yield reader, shard

    def close(self) -> None:
        """Forget every map."""
        for places in self.places.values():
            for reader in places.readers:
                reader.close()
