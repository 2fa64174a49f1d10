"""Joins samples into the batch a torchvision detector takes. The only module here that imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .geometry import View
from .sample import Sample


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of views in the frame.

    images: [B, 3, 480, 480] uint8, RGB, contiguous.
    targets: one dict an image, `boxes` [n, 4] float32 (xyxy, frame px), `labels` [n] int64 in 1..20, `difficult` [n]
        bool; n may be 0.
    image_sizes: (H, W) of the original images.
    """

    ids: tuple[str, ...]
    views: tuple[View, ...]
    images: Tensor
    targets: tuple[dict[str, Tensor], ...]
    image_sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def images_float(self) -> Tensor:
        """Return the images [B, 3, 480, 480] float32 in [0, 1], on the device they are on.

        Batches travel as uint8, a quarter of the bytes: convert after `to`.
        """
        return self.images.to(torch.float32).div_(255)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with every tensor on the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        targets = tuple({name: change(value) for name, value in target.items()} for target in self.targets)
        return replace(self, images=change(self.images), targets=targets)


def collate(samples: Sequence[Sample]) -> Batch:
    """Return the samples as one batch, in their order.

    Raises ValueError for no sample at all.
    """
    if not samples:
        raise ValueError("expected at least one sample to make a batch of, found none")
    images = np.stack([sample.image for sample in samples])
    return Batch(
        ids=tuple(sample.id for sample in samples),
        views=tuple(sample.view for sample in samples),
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        targets=tuple(
            {
                # Copies: records keep their arrays over epochs, and a batch may be changed in place.
                "boxes": torch.tensor(sample.boxes_xyxy, dtype=torch.float32),
                "labels": torch.tensor(sample.labels, dtype=torch.int64),
                "difficult": torch.tensor(sample.difficult, dtype=torch.bool),
            }
            for sample in samples
        ),
        image_sizes=tuple(sample.image_size for sample in samples),
    )
