"""Keeps the decoded, squashed images of a run in a store, so that no JPEG is decoded after the first pass over them.

The store is one of the cache's own (docs/cache-format.md): made whole or resumed by its writer, read through memory
maps. Every start hashes the run's image files and compares them with those that were decoded: a cache that is stale
is refused, never served.
"""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.catalog import Catalog, read_catalog
from cache.commit_queue import CommitQueue
from cache.image_arrays import StoredImages, refuse_mixing, removal_command, training_command
from cache.layout import IMAGES
from cache.open_storage import find_storage
from cache.plan import StorePlan
from cache.reader import ArrayReader
from cache.writer import MissingShard, StoreWriter, open_writer
from data.errors import (
    StoreCorruptError,
    StoreIncompleteError,
    StoreLockedError,
    StoreMissingError,
    StoreStaleError,
    StoreWriteError,
    TeachOnceError,
)
from data.geometry import FRAME_SIZE
from data.records import ImageRecord
from pipeline.extract import digest_images
from pipeline.image_frames import FRAMES, FrameDecoder, image_plan, in_stored_order, refuse_other_frames
from pipeline.loading import load_batches
from pipeline.progress import Tick, progress, say

# What a worker hands over at once: 11 MB.
_BATCH_SIZE = 16
_SECONDS_BETWEEN_LOOKS = 5.0
_IMAGE_BYTES = 3 * FRAME_SIZE[0] * FRAME_SIZE[1]
_ANOTHER = "give another store: --cache-images STORE"


def ensure_image_store(
    path: Path, records: Sequence[ImageRecord], sets: Sequence[str], limit: int | None = None, workers: int = 0
) -> StoredImages:
    """Return the decoded images of the records from the store at a path, which is made or finished where it must be.

    records: one that is named twice counts once; fewer than the store holds will do.  sets, limit: what they were
    read from, for the store's description.  workers: decoding processes. Where another process is writing the store,
    this one says so, waits, and then uses it.

    Raises StoreStaleError naming the field where the store holds other images, image files that have changed, another
    frame, pixels of another decoder, or no images; StoreIncompleteError where it lacks samples that are none of the
    records; StoreCorruptError; StoreWriteError where the disk refuses; ImageError.
    """
    by_id = {record.id: record for record in records}
    plan = image_plan(digest_images(list(by_id.values())), sets, limit)
    told = False
    while True:
        catalog = _opened(path, plan)
        if catalog is not None and (images := _complete(catalog, plan)) is not None:
            return images
        try:
            with _telling_of(path):
                _write(path, plan if catalog is None else in_stored_order(catalog, plan), by_id, workers)
        except StoreLockedError as error:
            if not told:
                say(f"{error.message}: waiting until it has cached the images")
            told = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _opened(path: Path, plan: StorePlan) -> Catalog | None:
    """Return the store at a path, None where there is none; raises StoreStaleError where it is not the plan's."""
    try:
        catalog = None if find_storage(path) is None else read_catalog(path)
    except (StoreCorruptError, StoreMissingError) as error:
        # Whose store this is cannot be told: nothing here may propose to remove that of a teacher.
        hint = f"see what is there: python cli.py inspect-cache {path}; or {_ANOTHER}"
        raise type(error)(error.message, hint=hint) from error
    if catalog is not None:
        refuse_mixing(catalog, plan)
        with _telling_of(path):
            refuse_other_frames(catalog, plan)
    return catalog


def _complete(catalog: Catalog, plan: StorePlan) -> StoredImages | None:
    """Return the plan's images where the store has all of them, None where some are still to be written.

    Raises StoreIncompleteError where this run does not have all of the images that the store is made of.
    """
    reader = ArrayReader(catalog.storage.array(catalog.teacher(FRAMES).view("original").layouts[IMAGES]))
    row_of_id = {sample.id: row for row, sample in enumerate(catalog.samples)}
    rows = {sample.id: row_of_id[sample.id] for sample in plan.samples}
    with _telling_of(catalog.path):
        missing = reader.missing_rows(list(rows.values()))
    if not missing:
        return StoredImages(catalog.path, reader, rows, {sample.id: sample.sha256 for sample in plan.samples})
    if len(rows) < len(row_of_id):
        raise StoreIncompleteError(
            f"{catalog.path}: {len(missing)} of the {len(rows)} images are not committed, and only a run on all"
            f" {len(row_of_id)} images of the store can finish it",
            hint=f"wait for the run that is writing it, or finish it: {training_command(catalog)}; or {_ANOTHER}",
        )
    return None


@contextmanager
def _telling_of(path: Path) -> Iterator[None]:
    """Give what is refused of an image store in the block the next command of one."""
    try:
        yield
    except StoreLockedError:
        raise
    except (StoreStaleError, StoreCorruptError) as error:
        hint = f"remove it, the same command makes it anew: {removal_command(path)}"
        raise type(error)(error.message, hint=f"{hint}; or {_ANOTHER}") from error
    except StoreWriteError as error:
        hint = f"see to that and run the same command again: it resumes; or {_ANOTHER}"
        raise type(error)(error.message, hint=hint) from error


def _write(path: Path, plan: StorePlan, by_id: Mapping[str, ImageRecord], workers: int) -> None:
    """Decode and commit what is missing; what was committed stays whatever ends it."""
    with open_writer(path, plan) as writer:
        missing = writer.missing()
        if not missing:  # another run has been quicker
            return
        count = sum(shard.count for shard in missing)
        say(f"caching {count} decoded images in {path}: {count * _IMAGE_BYTES / 1e9:.1f} GB")
        decoder = FrameDecoder([by_id[sample.id] for sample in plan.samples], plan.samples)
        try:
            with progress("caching images", count) as tick, CommitQueue(writer) as commits:
                _decode(decoder, missing, workers, commits, tick)
        except BaseException:
            with suppress(TeachOnceError):  # a full disk must not hide what went wrong first
                _note_provenance(writer, missing)
            raise
        _note_provenance(writer, missing)


def _decode(
    decoder: FrameDecoder, missing: Sequence[MissingShard], workers: int, commits: CommitQueue, tick: Tick
) -> None:
    jobs = [
        list(range(start, min(start + _BATCH_SIZE, shard.first + shard.count)))
        for shard in missing
        for start in range(shard.first, shard.first + shard.count, _BATCH_SIZE)
    ]
    loader = load_batches(decoder.decode, jobs, _stack, workers=workers, device=torch.device("cpu"))
    batches = iter(loader)
    for shard in missing:
        frames: dict[str, Any] = {IMAGES: np.empty((shard.count, *FRAME_SIZE, 3), np.uint8)}
        done = 0
        while done < shard.count:
            batch = next(batches)
            frames[IMAGES][done : done + len(batch)] = batch.numpy()
            done += len(batch)
            tick(len(batch))
        commits.submit(shard, frames)
    commits.finish()


def _stack(frames: list[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames))


def _note_provenance(writer: StoreWriter, missing: Sequence[MissingShard]) -> None:
    left = {shard.shard for shard in writer.missing()}
    written = sum(shard.count for shard in missing if shard.shard not in left)
    if written:
        versions = {package: importlib.metadata.version(package) for package in ("numpy", "pillow")}
        writer.note_provenance(
            FRAMES,
            "original",
            {
                "host": socket.gethostname(),
                "device": platform.machine(),
                "versions": {**versions, "python": platform.python_version()},
                "samples": written,
            },
        )
