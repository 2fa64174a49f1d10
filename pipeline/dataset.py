"""Which images a training step sees, in which view, and the rows of a store that belong to them.

Order, view and jitter are drawn from named streams keyed by (seed, epoch, id), so they do not depend on the arm, the
batch size or the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cache.image_arrays import StoredImages
from data.collate import Batch, collate
from data.errors import StoreStaleError
from data.geometry import View
from data.images import decode_image, image_digest, read_image_bytes, show_view, squash
from data.records import ImageRecord
from data.sample import Sample, frame_sample, squashed_sample
from data.transforms import jitter
from features.teacher import TeacherInput
from pipeline.randomness import stream


@dataclass(frozen=True)
class SampleKey:
    """One image of one epoch: its place in the records and the view it is shown in."""

    index: int
    view: View
    epoch: int


class EpochBatches:
    """The batches of an epoch, as lists of keys; set `epoch` before each pass."""

    def __init__(self, records: Sequence[ImageRecord], batch_size: int, flip: float, seed: int) -> None:
        self._ids = [record.id for record in records]
        self._batch_size = batch_size
        self._flip = flip
        self._seed = seed
        self._drawn: tuple[int, list[list[SampleKey]]] | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self._ids) // self._batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Loader and target source both go through an epoch: it is drawn once.
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, self._draw()
        return iter(self._drawn[1])

    def _draw(self) -> list[list[SampleKey]]:
        order = stream(self._seed, "order", self.epoch).permutation(len(self._ids)).tolist()
        keys = [SampleKey(index, self._view(index), self.epoch) for index in order]
        return [keys[start : start + self._batch_size] for start in range(0, len(keys), self._batch_size)]

    def _view(self, index: int) -> View:
        draw = stream(self._seed, "view", self.epoch, self._ids[index]).random()
        return "hflip" if draw < self._flip else "original"


@dataclass(frozen=True)
class LoadedBatch:
    """A batch for the student, and for live teachers the same views, without jitter, at each teacher's own size.

    teacher_images: uint8 [B, H, W, 3] by teacher input.
    """

    keys: tuple[SampleKey, ...]
    batch: Batch
    teacher_images: dict[TeacherInput, torch.Tensor]

    def pin_memory(self) -> LoadedBatch:
        """Return the batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        images = {key: image.pin_memory() for key, image in self.teacher_images.items()}
        return replace(self, batch=self.batch.pin_memory(), teacher_images=images)


@dataclass(frozen=True)
class _Loaded:
    key: SampleKey
    sample: Sample
    teacher_images: dict[TeacherInput, NDArray[np.uint8]]


class TrainingImages:
    """Loads one sample of a key; what a worker process runs.

    teacher_inputs: sizes that live teachers want.  digests: SHA-256 of each image by id, as the store saw it; compared
    when a process first decodes the image.  images: where the decoded images are; without it they are decoded each
    time. Live teachers need the originals, which are then decoded for them all the same.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        *,
        seed: int = 0,
        jitter_strength: float = 0.0,
        teacher_inputs: Sequence[TeacherInput] = (),
        digests: dict[str, str] | None = None,
        images: StoredImages | None = None,
    ) -> None:
        """Load the records.

        Raises StoreStaleError where the teachers saw another image than the one that was decoded into the store.
        """
        self._records = records
        self._seed = seed
        self._jitter = jitter_strength
        self._teacher_inputs = tuple(teacher_inputs)
        self._digests = dict(digests or {})
        self._seen_by = "the teachers"
        self._images = images
        if images is not None:
            self._compare_stores(images)

    def load(self, key: SampleKey) -> _Loaded:
        """Return the sample of a key.

        Raises ImageError for a bad image, StoreStaleError where it is not the image that the teachers saw.
        """
        record = self._records[key.index]
        if self._images is None:
            shown = self._show(record, key.view)
            sample, for_teachers = frame_sample(record, key.view, shown), self._resize(shown)
        else:
            sample = squashed_sample(record, key.view, _as_shown(self._images.read(record.id), key.view))
            for_teachers = self._resize(self._show(record, key.view)) if self._teacher_inputs else {}
        if self._jitter:
            rng = stream(self._seed, "jitter", key.epoch, record.id)
            sample = replace(sample, image=jitter(sample.image, rng, self._jitter))
        return _Loaded(key, sample, for_teachers)

    def _show(self, record: ImageRecord, view: View) -> Image.Image:
        """Return the original image as the view shows it, once it is known to be the one that the stores saw."""
        data = read_image_bytes(record.image_path)
        expected = self._digests.pop(record.id, None)
        if expected is not None:
            _refuse_other_image(record, expected, image_digest(data), self._seen_by)
        return show_view(decode_image(record, data), view)

    def _resize(self, shown: Image.Image) -> dict[TeacherInput, NDArray[np.uint8]]:
        return {wanted: squash(shown, wanted.size, wanted.resample) for wanted in self._teacher_inputs}

    def _compare_stores(self, images: StoredImages) -> None:
        for record in self._records:
            expected = self._digests.get(record.id)
            if expected is not None:
                _refuse_other_image(record, expected, images.digests[record.id], self._seen_by)
        # What is still decoded, for live teachers, must be what was decoded for the student.
        self._digests = {record.id: images.digests[record.id] for record in self._records if self._teacher_inputs}
        self._seen_by = str(images.path)


def _as_shown(frame: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """Return a squashed image [H, W, 3] as the view shows it: mirroring and squashing commute, to the bit."""
    if view == "original":
        return frame
    # Five times as quick as numpy, which copies a mirrored row pixel by pixel.
    mirrored: NDArray[np.uint8] = torch.from_numpy(frame.copy()).flip(1).numpy()
    return mirrored


def _refuse_other_image(record: ImageRecord, expected: str, found: str, seen_by: str) -> None:
    if found != expected:
        raise StoreStaleError(
            f"{record.image_path}: the image changed since {seen_by} saw it:"
            f" dataset.samples[{record.id}].sha256: expected SHA-256 {expected}, found {found}",
            hint="restore the image, or extract a new store from the images as they are now",
        )


def collate_loaded(items: list[_Loaded]) -> LoadedBatch:
    """Return the loaded samples as one batch, in their order."""
    inputs = items[0].teacher_images
    return LoadedBatch(
        keys=tuple(item.key for item in items),
        batch=collate([item.sample for item in items]),
        teacher_images={
            key: torch.from_numpy(np.stack([item.teacher_images[key] for item in items])) for key in inputs
        },
    )


def plain_batches(count: int, batch_size: int) -> list[list[SampleKey]]:
    """Return keys that show every image once, in order, in the original view: for evaluation."""
    keys = [SampleKey(index, "original", 0) for index in range(count)]
    return [keys[start : start + batch_size] for start in range(0, count, batch_size)]
