"""Fills what a store lacks: images are decoded once for all teachers and views, teachers run batch by batch.

Batches lie on a grid that starts anew at each shard, so that a resumed store has the bytes of an uninterrupted one.
"""

from __future__ import annotations

import platform
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.commit_queue import CommitQueue
from cache.samples import SampleEntry
from cache.writer import MissingShard, StoreWriter
from data.errors import ImageError, TeacherError, TeachOnceError
from data.geometry import View
from data.images import decode_image, image_digest, read_image_bytes, show_view, squash
from data.records import ImageRecord
from features.teacher import Teacher, TeacherInput
from pipeline.loading import load_batches
from pipeline.progress import Tick, progress, say

Outputs = dict[str, NDArray[np.floating]]
Target = tuple[str, View]  # a teacher's key and a view
_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class _Job:
    """One image to decode, for these (view, input) pairs."""

    row: int
    wanted: tuple[tuple[View, TeacherInput], ...]


@dataclass(frozen=True)
class _Decoded:
    rows: list[int]
    images: dict[tuple[View, TeacherInput], torch.Tensor]  # uint8 [B, H, W, 3]

    def pin_memory(self) -> _Decoded:
        return _Decoded(self.rows, {key: image.pin_memory() for key, image in self.images.items()})


@dataclass(frozen=True)
class _Decoder:
    """What a worker process runs; it is pickled where processes are spawned, so it holds no teacher."""

    records: Sequence[ImageRecord]
    samples: Sequence[SampleEntry]

    def decode(self, job: _Job) -> tuple[int, dict[tuple[View, TeacherInput], NDArray[np.uint8]]]:
        record = self.records[job.row]
        data = read_image_bytes(record.image_path)
        if image_digest(data) != self.samples[job.row].sha256:
            raise ImageError(
                f"{record.image_path}: the image changed while the teachers were running",
                hint="put it back and run the same command again, or extract a new store (--out)",
            )
        image = decode_image(record, data)
        shown = {view: show_view(image, view) for view in {view for view, _ in job.wanted}}
        return job.row, {(view, i): squash(shown[view], i.size, i.resample) for view, i in job.wanted}


class Filling:
    """One pass that fills what a store lacks.

    seconds: by teacher, over all views.  computed: outputs, teacher × view × image.
    """

    def __init__(
        self,
        writer: StoreWriter,
        records: Sequence[ImageRecord],
        samples: Sequence[SampleEntry],
        teachers: dict[str, Teacher],
        device: torch.device,
        workers: int,
    ) -> None:
        self._writer = writer
        self._decoder = _Decoder(records, samples)
        self._samples = samples
        self._teachers = teachers
        self._device = device
        self._workers = workers
        self.seconds: dict[str, float] = dict.fromkeys(teachers, 0.0)
        self.computed = 0

    def fill(self) -> None:
        """Compute and commit everything that is missing; what was committed stays whatever ends it.

        Raises ImageError, TeacherError or StoreWriteError.
        """
        missing = self._writer.missing()
        if not missing:
            say("the store is complete: nothing to do")
            return
        # Views recorded with another batch size are filled in a pass of their own: bytes depend on the batch size.
        by_batch_size: dict[int, list[MissingShard]] = defaultdict(list)
        for shard in missing:
            by_batch_size[self._writer.batch_size(shard.teacher, shard.view)].append(shard)
        total = sum(shard.count for shard in missing)
        try:
            with progress("extracting", total, "targets") as tick, CommitQueue(self._writer) as commits:
                for batch_size, shards in by_batch_size.items():
                    self._fill(shards, batch_size, commits, tick)
        except BaseException:
            with suppress(TeachOnceError):  # a full disk must not hide what went wrong first
                self._note_provenance(missing)
            raise
        self._note_provenance(missing)

    def _note_provenance(self, missing: list[MissingShard]) -> None:
        """Note what this pass has committed, also where it ends early: its cost is part of the store's."""
        left = {(shard.teacher, shard.view, shard.shard) for shard in self._writer.missing()}
        done = [shard for shard in missing if (shard.teacher, shard.view, shard.shard) not in left]
        for target in {(shard.teacher, shard.view) for shard in done}:
            self._writer.note_provenance(*target, self._provenance(target, done))

    def _fill(self, missing: list[MissingShard], batch_size: int, commits: CommitQueue, tick: Tick) -> None:
        ranges: dict[tuple[int, int], list[MissingShard]] = defaultdict(list)
        for shard in missing:
            ranges[shard.first, shard.count].append(shard)
        jobs = list(self._jobs(ranges, batch_size))
        loader = load_batches(self._decoder.decode, jobs, _collate_decoded, workers=self._workers, device=self._device)
        decoded = iter(loader)
        for (first, count), shards in ranges.items():
            outputs = self._shard_outputs(shards, first, count, decoded, tick)
            for shard in shards:
                commits.submit(shard, outputs.pop((shard.teacher, shard.view)))

    def _jobs(self, ranges: dict[tuple[int, int], list[MissingShard]], batch_size: int) -> Iterator[list[_Job]]:
        for (first, count), shards in ranges.items():
            wanted = tuple(dict.fromkeys((s.view, self._teachers[s.teacher].input) for s in shards))
            for start in range(first, first + count, batch_size):
                yield [_Job(row, wanted) for row in range(start, min(start + batch_size, first + count))]

    def _shard_outputs(
        self, shards: list[MissingShard], first: int, count: int, decoded: Iterator[_Decoded], tick: Tick
    ) -> dict[Target, Outputs]:
        outputs: dict[Target, Outputs] = {
            (s.teacher, s.view): {
                name: np.empty((count, *shape), dtype=self._buffer_dtype(name))
                for name, shape in self._teachers[s.teacher].output_shapes.items()
            }
            for s in shards
        }
        done = 0
        while done < count:
            batch = next(decoded)
            rows = slice(batch.rows[0] - first, batch.rows[-1] + 1 - first)
            for key, view in outputs:
                self._run_teacher(key, view, batch, rows, outputs[key, view])
                tick(len(batch.rows))
            done += len(batch.rows)
        return outputs

    def _buffer_dtype(self, name: str) -> str:
        """Return the dtype in which an output is handed to the writer, which quantises from float32."""
        return "float16" if name == "features" and self._writer.plan.feature_dtype == "float16" else "float32"

    def _run_teacher(self, key: str, view: View, batch: _Decoded, rows: slice, out: Outputs) -> None:
        teacher = self._teachers[key]
        start = time.monotonic()
        result = teacher(batch.images[view, teacher.input].to(self._device, non_blocking=True)).arrays()
        for name, values in result.items():
            if not bool(torch.isfinite(values).all()):
                bad = batch.rows[int((~torch.isfinite(values.flatten(1)).all(dim=1)).nonzero()[0])]
                raise TeacherError(
                    f"{key}: {name} of {self._samples[bad].id} ({view}) holds values that are not finite",
                    hint="check the weights; what was committed before is intact",
                )
            # Cast where it is fast: what cannot be held becomes infinite and is refused by the writer.
            out[name][rows] = values.to(_TORCH_DTYPES[self._buffer_dtype(name)]).cpu().numpy()
        self.seconds[key] += time.monotonic() - start
        self.computed += len(batch.rows)

    def _provenance(self, target: Target, done: Iterable[MissingShard]) -> dict[str, Any]:
        key, _ = target
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else platform.machine()
        taught = self._teachers[key].provenance()
        return {
            **taught,
            "host": socket.gethostname(),
            "device": device,
            "versions": {**taught["versions"], "python": platform.python_version()},
            "samples": sum(s.count for s in done if (s.teacher, s.view) == target),
            "batch_size": self._writer.batch_size(*target),
            "teacher_seconds_all_views": round(self.seconds[key], 3),
        }


def _collate_decoded(items: list[tuple[int, dict[tuple[View, TeacherInput], NDArray[np.uint8]]]]) -> _Decoded:
    rows = [row for row, _ in items]
    keys = items[0][1]
    return _Decoded(rows, {key: torch.from_numpy(np.stack([images[key] for _, images in items])) for key in keys})
