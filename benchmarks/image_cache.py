"""Training images from the store of decoded images, beside decoding and squashing the files in every epoch.

It runs before any contender with threads of its own is opened: the workers are forked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rounds import Pass, in_turn, timed
from benchmarks.tables import Figure, Table, time_table
from cache.image_arrays import StoredImages
from data.records import ImageRecord
from data.synthetic import make_devkit
from data.voc import read_voc
from pipeline.dataset import EpochBatches, TrainingImages, collate_loaded
from pipeline.image_cache import ensure_image_store
from pipeline.loading import load_batches

IMAGES = 128
BATCH_SIZE = 8
_SETS = ("2007:train",)


def image_cache_table(folder: Path, rounds: int, records: Sequence[ImageRecord] | None = None) -> Table:
    """Return the table of the images that arrive a second, flipped at random, each seen once in a pass.

    records: the images, by default 128 drawn ones of VOC's sizes. Nobody looks at the batches. Both are warm: files and
    store lie in the page cache, and every checksum was verified in the round that is left out.
    """
    if records is None:
        records = read_voc(make_devkit(folder / "VOCdevkit", num_train=IMAGES, num_val=1), _SETS)
    images = ensure_image_store(folder / "images.zarr", records, _SETS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    passes: dict[str, Pass] = {}
    for workers in (0, 2):
        passes[f"store, {workers} workers"] = _pass(records, workers, images)
        passes[f"decode + squash, {workers} workers"] = _pass(records, workers, None)
    found = in_turn(passes, rounds + 1)
    torch.set_num_threads(threads)
    figures = [Figure(name, seconds[1:]) for name, seconds in found.items()]
    return time_table("Training images: batches of 8, warm", figures, unit="samples/s")


def _pass(records: Sequence[ImageRecord], workers: int, images: StoredImages | None) -> Pass:
    batches = EpochBatches(records, BATCH_SIZE, flip=0.5, seed=0)
    loaded = TrainingImages(records, images=images)
    loader = load_batches(loaded.load, batches, collate_loaded, workers=workers, device=torch.device("cpu"))

    def run(number: int) -> float:
        batches.epoch = number
        return timed(lambda: sum(len(batch.keys) for batch in loader)) / len(records)

    return run
