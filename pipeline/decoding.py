"""Decodes images for teachers: each once, for all views and all teacher inputs that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache.samples import SampleEntry
from data.errors import ImageError
from data.geometry import View
from data.images import decode_image, image_digest, read_image_bytes, squash_views
from data.records import ImageRecord
from features.teacher import TeacherInput

Shown = tuple[View, TeacherInput]


@dataclass(frozen=True)
class DecodeJob:
    """One image to decode, for these views and inputs."""

    row: int
    wanted: tuple[Shown, ...]


@dataclass(frozen=True)
class DecodedBatch:
    """Consecutive rows of the store. images: uint8 [B, H, W, 3] by view and teacher input."""

    rows: list[int]
    images: dict[Shown, torch.Tensor]

    def pin_memory(self) -> DecodedBatch:
        """Return the batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return DecodedBatch(self.rows, {key: image.pin_memory() for key, image in self.images.items()})


@dataclass(frozen=True)
class Decoder:
    """What a worker process runs; it is pickled where processes are spawned, so it holds no teacher."""

    records: Sequence[ImageRecord]
    samples: Sequence[SampleEntry]

    def decode(self, job: DecodeJob) -> tuple[int, dict[Shown, NDArray[np.uint8]]]:
        """Return a job's row and images [H, W, 3] uint8.

        Raises ImageError for an image that cannot be decoded, or is not the one that was hashed.
        """
        record = self.records[job.row]
        data = read_image_bytes(record.image_path)
        if image_digest(data) != self.samples[job.row].sha256:
            raise ImageError(
                f"{record.image_path}: the image changed while the teachers were running",
                hint="put it back and run the same command again, or extract a new store (--out)",
            )
        image = decode_image(record, data)
        views: dict[TeacherInput, list[View]] = {}
        for view, wanted in job.wanted:
            views.setdefault(wanted, []).append(view)
        return job.row, {
            (view, wanted): pixels
            for wanted, shown in views.items()
            for view, pixels in squash_views(image, shown, wanted.size, wanted.resample).items()
        }


def collate_decoded(items: list[tuple[int, dict[Shown, NDArray[np.uint8]]]]) -> DecodedBatch:
    """Return decoded images as one batch, in their order."""
    rows = [row for row, _ in items]
    return DecodedBatch(
        rows, {key: torch.from_numpy(np.stack([images[key] for _, images in items])) for key in items[0][1]}
    )
