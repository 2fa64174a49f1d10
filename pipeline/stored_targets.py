"""Targets of a training run, read from one or several teacher caches; no teacher is ever loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.reader import TeacherStore
from cache.residency import available_memory, populate, refuse_too_large, shard_bytes
from cache.selected_array import SelectedArray
from cache.selection import Selection
from data.errors import StoreStaleError, UsageError
from data.geometry import View
from data.records import ImageRecord
from pipeline.byte_progress import megabytes
from pipeline.config import Distillation, Residency
from pipeline.dataset import LoadedBatch, SampleKey
from pipeline.device_arrays import DeviceArrays
from pipeline.gather_ahead import GatherAhead
from pipeline.randomness import stream
from pipeline.targets import (
    ChannelStatistics,
    RegionText,
    TargetSource,
    TeacherTargets,
    region_text_of,
)
from pipeline.teacher_choice import REGIONS, choose_teachers, select_arrays, stored_outputs


class StoredTargets(TargetSource):
    """Targets read through memory maps, or held on the training device.

    selection: which store serves which image.  choice: the teachers that are read.
    """

    def __init__(
        self,
        config: Distillation,
        records: Sequence[ImageRecord],
        views: Sequence[View],
        device: torch.device,
        residency: Residency = "mmap",
    ) -> None:
        """Open the configured stores and check that they can serve every training image in every view that is drawn.

        Raises StoreMissingError, StoreIncompleteError (teachers, views, images, shards), StoreStaleError (frame,
        fingerprint, stores that do not agree) or StoreCorruptError; UsageError where the choice of teachers is open,
        or the targets do not fit where they shall be held.
        """
        self._device = device
        stores = [TeacherStore(path) for path in config.stores]
        _refuse_other_fingerprints(stores, config.expect_fingerprints)
        self.selection = Selection(stores, [record.id for record in records])
        self.choice = choose_teachers(config, stored_outputs(self.selection), self.selection.where)
        self._arrays = select_arrays(self.selection, self.choice, config, views)
        if self.choice.features is not None:
            gh, gw, channels = self._arrays["features"].sample_shape
            self.feature_shape = (gh, gw, channels)
        self._place = shuffled_places(len(records), config.target_shuffle)
        self.digests = self.selection.digests
        self._manifests = {key: self.selection.manifest(key) for key in self.choice.used}
        self.untrained = tuple(key for key, manifest in self._manifests.items() if manifest.untrained)
        self._positions = {image_id: position for position, image_id in enumerate(self.selection.ids)}
        self._ahead: GatherAhead | None = None
        self._held = DeviceArrays(self._arrays, device) if residency == "device" else None
        if residency == "ram":
            _hold_in_memory(list(self._arrays.values()))

    def statistics(self) -> ChannelStatistics:
        """Return the statistics from the stored moments of the training images."""
        assert self.choice.features is not None
        return ChannelStatistics.of(*self.selection.channel_statistics(self.choice.features), self._device)

    def logit_centre(self) -> Tensor:
        """Return the mean of the stored logits of the training images."""
        assert self.choice.logits is not None
        array = self.selection.arrays(self.choice.logits, "logits", ("original",))["logits"]
        count = len(self.selection.ids)
        logits = array.gather(list(range(count)), ["original"] * count)
        return torch.from_numpy(logits.mean(axis=0, dtype=np.float64).astype(np.float32)).to(self._device)

    def region_text(self) -> RegionText | None:
        """Return the region teacher's text embeddings, scale and bias, as they are stored."""
        if self.choice.regions is None:
            return None
        embeddings = self.selection.text_embeddings(self.choice.regions)
        return region_text_of(embeddings, self._manifests[self.choice.regions].identity, self._device)

    @contextmanager
    def following(self, batches: Sequence[Sequence[SampleKey]]) -> Iterator[None]:
        """Gather the targets of these batches ahead, in a thread, unless the device holds them anyway."""
        if self._held is not None or not self._arrays:
            yield
            return
        self._ahead = GatherAhead(self._arrays, batches, self._device, self._place)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def __call__(self, loaded: LoadedBatch) -> TeacherTargets:
        """Return the targets of a batch, each row in the view its image is shown in."""
        if self._ahead is not None:
            arrays = self._ahead.take(loaded.keys)
        else:
            arrays = self._fetch(
                [self._place[self._positions[image_id]] for image_id in loaded.batch.ids],
                [key.view for key in loaded.keys],
            )
        regions = {name.removeprefix(REGIONS): rows for name, rows in arrays.items() if name.startswith(REGIONS)}
        return TeacherTargets(
            features=decode_features(arrays) if "features" in arrays else None,
            logits=arrays.get("logits"),
            regions=decode_features(regions) if regions else None,
        )

    def _fetch(self, positions: list[int], views: list[View]) -> dict[str, Tensor]:
        if self._held is not None:
            return self._held.gather(positions, views)
        return {
            name: torch.from_numpy(array.gather(positions, views)).to(self._device)
            for name, array in self._arrays.items()
        }

    def record(self) -> dict[str, Any]:
        """Return what identifies the targets.

        `teachers` that are distilled, `untrained` ones, their `identities` by key, and `stores`: path, fingerprint, and
        fingerprint, content digest, shape and dtype of every array that is read.
        """
        return {
            "source": "store",
            "teachers": self.choice.record(),
            "untrained": list(self.untrained),
            "identities": {key: manifest.identity for key, manifest in self._manifests.items()},
            "stores": self.selection.record(self._arrays.values()),
        }


def shuffled_places(count: int, shuffle: int | None) -> Sequence[int]:
    """Return whose targets each image gets: its own, or, shuffled by a seed, another image's.

    Raises UsageError where a single image shall be shuffled.
    """
    if shuffle is None:
        return range(count)
    if count < 2:
        raise UsageError(f"--target-shuffle: expected two training images or more, found {count}")
    order = stream(shuffle, "target-shuffle").permutation(count)
    places = np.empty(count, dtype=np.int64)
    places[order] = np.roll(order, 1)  # one cycle through all of them: none keeps its own
    return [int(place) for place in places]


def decode_features(arrays: Mapping[str, Tensor]) -> Tensor:
    """Return features as numbers, [B, Gh, Gw, C]: int8 multiplied by their scales, float32; others as they are.

    arrays: `features`, with `scale_channel` [B, C] and `scale_token` [B, Gh, Gw] float32 where they are int8. Bit by
    bit what `cache.int8.dequantise` returns, on the arrays' own device.
    """
    features = arrays["features"]
    if features.dtype != torch.int8:
        return features
    restored = features.to(torch.float32) * arrays["scale_token"][..., None]
    return restored * arrays["scale_channel"][:, None, None, :]


def _hold_in_memory(arrays: Sequence[SelectedArray]) -> None:
    needed = shard_bytes(arrays)
    refuse_too_large("ram", needed, available_memory())
    with megabytes("reading targets into memory", needed) as advance:
        populate(arrays, advance)


def _refuse_other_fingerprints(stores: Sequence[TeacherStore], expected: Sequence[str]) -> None:
    if not expected:
        return
    for store, fingerprint in zip(stores, expected, strict=True):
        if not store.catalog.fingerprint.startswith(fingerprint):
            raise StoreStaleError(
                f"{store.catalog.path}: expected fingerprint {fingerprint}, found {store.catalog.fingerprint}",
                hint=f"see what it holds: python cli.py inspect-cache {store.catalog.path}",
            )
