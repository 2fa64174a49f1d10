"""Fills what a store lacks: images are decoded once for all teachers and views, teachers run batch by batch.

Batches lie on a grid that starts anew at each shard, so that a resumed store has the bytes of an uninterrupted one.
"""

from __future__ import annotations

import platform
import socket
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from cache.commit_queue import CommitQueue
from cache.samples import SampleEntry
from cache.writer import MissingShard, StoreWriter
from data.errors import TeacherError, TeachOnceError
from data.records import ImageRecord
from features.prompt_file import PromptFile
from features.teacher import Teacher
from pipeline.decoding import DecodedBatch, DecodeJob, Decoder, collate_decoded
from pipeline.loading import load_batches
from pipeline.progress import Tick, progress, say
from pipeline.stage_times import StageTimes
from pipeline.teacher_runner import Flight, Target, TeacherRunner

Buffers = dict[Target, dict[str, torch.Tensor]]
Ranges = dict[tuple[int, int], list[MissingShard]]  # by first sample and count
_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Launched and not yet waited for: enough for a GPU never to wait for the next launch.
_IN_FLIGHT = 2


class Filling:
    """One pass that fills what a store lacks.

    prompts: the file of the teachers' prompts, to be noted.  computed: outputs, teacher × view × image.  times: where
    the time went.
    """

    def __init__(
        self,
        writer: StoreWriter,
        records: Sequence[ImageRecord],
        samples: Sequence[SampleEntry],
        teachers: dict[str, Teacher],
        device: torch.device,
        workers: int,
        prompts: PromptFile | None = None,
    ) -> None:
        self._writer = writer
        self._decoder = Decoder(records, samples)
        self._samples = samples
        self._teachers = teachers
        self._device = device
        self._workers = workers
        self._prompts = prompts
        self.times = StageTimes()
        self._runner = TeacherRunner(teachers, device, self.times)
        self.computed = 0

    @property
    def teacher_seconds(self) -> dict[str, float]:
        """Seconds at work by teacher, over all views."""
        return self._runner.teacher_seconds

    def fill(self) -> None:
        """Compute and commit everything that is missing; what was committed stays whatever ends it.

        Raises ImageError, TeacherError or StoreWriteError.
        """
        missing = self._writer.missing()
        if not missing:
            say("the store is complete: nothing to do")
            return
        start = time.perf_counter()
        try:
            self._fill_all(missing)
        except BaseException:
            self.times.wall = time.perf_counter() - start
            with suppress(TeachOnceError):  # a full disk must not hide what went wrong first
                self._note_provenance(missing)
            raise
        self.times.wall = time.perf_counter() - start
        self._note_provenance(missing)

    def _fill_all(self, missing: list[MissingShard]) -> None:
        # Views recorded with another batch size are filled in a pass of their own: bytes depend on the batch size.
        by_batch_size: dict[int, list[MissingShard]] = defaultdict(list)
        for shard in missing:
            by_batch_size[self._writer.batch_size(shard.teacher, shard.view)].append(shard)
        total = sum(shard.count for shard in missing)
        with progress("extracting", total, "targets") as tick:
            commits = CommitQueue(self._writer)
            with commits:
                for batch_size, shards in by_batch_size.items():
                    self._fill(shards, batch_size, commits, tick)
                with self.times.waiting("disk"):
                    commits.finish()

    def _note_provenance(self, missing: list[MissingShard]) -> None:
        """Note what this pass has committed, also where it ends early: its cost is part of the store's."""
        left = {(shard.teacher, shard.view, shard.shard) for shard in self._writer.missing()}
        done = [shard for shard in missing if (shard.teacher, shard.view, shard.shard) not in left]
        for target in {(shard.teacher, shard.view) for shard in done}:
            self._writer.note_provenance(*target, self._provenance(target, done))

    def _fill(self, missing: list[MissingShard], batch_size: int, commits: CommitQueue, tick: Tick) -> None:
        ranges: Ranges = defaultdict(list)
        for shard in missing:
            ranges[shard.first, shard.count].append(shard)
        jobs = list(self._jobs(ranges, batch_size))
        loader = load_batches(self._decoder.decode, jobs, collate_decoded, workers=self._workers, device=self._device)
        in_flight: deque[tuple[Flight, list[MissingShard], Buffers]] = deque()
        for flown in self._launches(ranges, iter(loader)):
            in_flight.append(flown)
            while len(in_flight) > (_IN_FLIGHT if self._device.type == "cuda" else 0):
                self._land(*in_flight.popleft(), commits, tick)
        while in_flight:
            self._land(*in_flight.popleft(), commits, tick)

    def _jobs(self, ranges: Ranges, batch_size: int) -> Iterator[list[DecodeJob]]:
        for (first, count), shards in ranges.items():
            wanted = tuple(dict.fromkeys((s.view, self._teachers[s.teacher].input) for s in shards))
            for start in range(first, first + count, batch_size):
                yield [DecodeJob(row, wanted) for row in range(start, min(start + batch_size, first + count))]

    def _launches(
        self, ranges: Ranges, decoded: Iterator[DecodedBatch]
    ) -> Iterator[tuple[Flight, list[MissingShard], Buffers]]:
        """Launch every batch; yield it with the shards that it completes and their buffers, mostly none."""
        for (first, count), shards in ranges.items():
            buffers = self._buffers(shards, count)
            done = 0
            while done < count:
                with self.times.waiting("decode"):
                    batch = next(decoded)
                rows = slice(done, done + len(batch.rows))
                assert batch.rows[0] == first + done
                outputs = {t: {name: values[rows] for name, values in named.items()} for t, named in buffers.items()}
                flight = self._runner.launch(batch, outputs)
                done = rows.stop
                yield flight, shards if done == count else [], buffers

    def _buffers(self, shards: list[MissingShard], count: int) -> Buffers:
        """Return room for what teachers say of a range; torch hands page-locked memory out again once it is free."""
        pinned = self._device.type == "cuda"
        return {
            (s.teacher, s.view): {
                name: torch.empty((count, *shape), dtype=self._buffer_dtype(name), pin_memory=pinned)
                for name, shape in self._teachers[s.teacher].output_shapes.items()
            }
            for s in shards
        }

    def _buffer_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which an output is handed to the writer, which quantises from float32."""
        half = name == "features" and self._writer.plan.feature_dtype == "float16"
        return _TORCH_DTYPES["float16" if half else "float32"]

    def _land(
        self, flight: Flight, complete: list[MissingShard], buffers: Buffers, commits: CommitQueue, tick: Tick
    ) -> None:
        bad = flight.land()
        self._runner.account(flight)
        if bad is not None:
            (key, view), name, row = bad
            raise TeacherError(
                f"{key}: {name} of {self._samples[row].id} ({view}) holds values that are not finite",
                hint="check the weights, or compute in another --precision; what was committed before is intact",
            )
        outputs = len(flight.rows) * len(buffers)
        self.computed += outputs
        self.times.images += len(flight.rows)
        tick(outputs)
        for shard in complete:
            arrays = {name: values.numpy() for name, values in buffers.pop((shard.teacher, shard.view)).items()}
            with self.times.waiting("disk"):
                commits.submit(shard, arrays)

    def _provenance(self, target: Target, done: Iterable[MissingShard]) -> dict[str, Any]:
        key, _ = target
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else platform.machine()
        taught = self._teachers[key].provenance()
        halvings = self._runner.halvings[key]
        prompts = self._prompts if self._teachers[key].text_embeddings is not None else None
        return {
            **taught,
            "host": socket.gethostname(),
            "device": device,
            "versions": {**taught["versions"], "python": platform.python_version()},
            "samples": sum(s.count for s in done if (s.teacher, s.view) == target),
            "batch_size": self._writer.batch_size(*target),
            **({"prompts": {"file": str(prompts.path), "sha256": prompts.sha256}} if prompts else {}),
            **({"out_of_memory_halvings": halvings} if halvings else {}),
            "teacher_seconds_all_views": round(self.teacher_seconds[key], 3),
            "rank": self._writer.ranks.rank,
            "ranks": self._writer.ranks.size,
            "workers": self._workers,
            "pass": self.times.facts(),
        }
