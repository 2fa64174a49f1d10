"""Stage 1: runs frozen teachers over an image set, once, and writes what they say to a store.

Every image is decoded once for all teachers and views; each teacher gets one antialiased resize from the original.
Batches lie on a grid that starts anew at each shard, so that a resumed store has the bytes of an uninterrupted one.
"""

from __future__ import annotations

import platform
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.commit_queue import CommitQueue
from cache.manifest import StoredDtype, check_teacher_key
from cache.plan import StorePlan, TeacherPlan
from cache.samples import SampleEntry
from cache.writer import MissingShard, StoreWriter, open_writer
from data.errors import ImageError, TeacherError, UsageError
from data.geometry import VIEWS, View
from data.images import decode_image, image_digest, read_image_bytes, show_view, squash
from data.records import ImageRecord
from data.voc import read_voc
from features.registry import build_teacher
from features.teacher import Teacher, TeacherInput, probe
from pipeline.device import choose_device
from pipeline.loading import load_batches
from pipeline.progress import Tick, progress, say

DEFAULT_TEACHERS = ("dinov2_vits14", "clip_vitb32")
Outputs = dict[str, NDArray[np.floating]]
Target = tuple[str, View]  # a teacher's key and a view
_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExtractConfig:
    """What `extract-teachers` was asked for; every field is one of its options."""

    voc_root: Path
    voc_sets: tuple[str, ...]
    out: Path
    teachers: tuple[str, ...] = DEFAULT_TEACHERS
    views: tuple[View, ...] = VIEWS
    dtype: StoredDtype = "float16"
    shard_samples: int = 64
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    weights: dict[str, Path] = field(default_factory=dict)
    untrained: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Extraction:
    """What an extraction did. samples: images of the store; computed: teacher × view × image outputs of this run."""

    store: Path
    samples: int
    computed: int
    seconds: float
    seconds_by_teacher: dict[str, float]
    untrained: tuple[str, ...]


def extract(config: ExtractConfig) -> Extraction:
    """Make or resume the store that the configuration asks for.

    Raises UsageError, DatasetError, TeacherError or one of the store's errors; whatever was committed stays.
    """
    device = choose_device(config.device)
    records = read_voc(config.voc_root, config.voc_sets, config.limit)
    start = time.monotonic()
    samples = digest_images(records)
    teachers = build_teachers(config.teachers, config.weights, config.untrained, device)
    plan = StorePlan(
        sets=config.voc_sets,
        limit=config.limit,
        samples=samples,
        teachers=[teacher_plan(key, teacher) for key, teacher in teachers.items()],
        views=config.views,
        feature_dtype=config.dtype,
        shard_samples=config.shard_samples,
        batch_size=config.batch_size,
    )
    with open_writer(config.out, plan) as writer:
        run = _Run(writer, records, samples, teachers, device, workers_for(config.workers, device))
        run.fill()
        writer_seconds = dict(run.seconds)
    return Extraction(
        store=config.out,
        samples=len(records),
        computed=run.computed,
        seconds=time.monotonic() - start,
        seconds_by_teacher=writer_seconds,
        untrained=tuple(key for key, teacher in teachers.items() if teacher.untrained),
    )


def build_teachers(
    specs: Sequence[str], weights: dict[str, Path], untrained: bool, device: torch.device
) -> dict[str, Teacher]:
    """Return the teachers by key, on the device. A spec is NAME, or KEY=SPEC to choose the key in the store.

    Raises UsageError for a bad key, a key given twice, or weights for a teacher that was not asked for.
    """
    named: dict[str, str] = {}
    for text in specs:
        key, separator, spec = text.partition("=")
        key, spec = (key, spec) if separator else (text, text)
        try:
            check_teacher_key(key)
        except ValueError as error:
            raise UsageError(f"--teacher {text}: {error}", hint=f"name it yourself: --teacher mykey={spec}") from None
        if key in named:
            raise UsageError(f"--teacher {key} is given twice", hint="give each its own key: --teacher KEY=SPEC")
        named[key] = spec
    stray = sorted(set(weights) - set(named) - set(named.values()))
    if stray:
        raise UsageError(f"--weights {stray[0]}=…: no such teacher was asked for (asked: {', '.join(named)})")
    teachers = {}
    for key, spec in named.items():
        say(f"building teacher {key}{' (untrained)' if untrained else ''}")
        path = weights.get(key, weights.get(spec))
        teachers[key] = build_teacher(spec, weights=path, untrained=untrained and path is None).to(device)
    return teachers


def teacher_plan(key: str, teacher: Teacher) -> TeacherPlan:
    """Return a teacher as the store sees it, its probe computed now."""
    return TeacherPlan(
        key=key,
        identity=teacher.identity(),
        untrained=teacher.untrained,
        probe=probe(teacher),
        outputs=teacher.output_shapes,
        text_embeddings=teacher.text_embeddings,
    )


def digest_images(records: Sequence[ImageRecord]) -> list[SampleEntry]:
    """Return the store's row of every record; reading the files also warms the page cache for decoding."""

    def entry(record: ImageRecord) -> SampleEntry:
        height, width = record.image_size
        return SampleEntry(record.id, height, width, image_digest(read_image_bytes(record.image_path)))

    with ThreadPoolExecutor(max_workers=8) as pool, progress("hashing images", len(records)) as tick:
        samples = []
        for sample in pool.map(entry, records):
            samples.append(sample)
            tick()
    return samples


def workers_for(asked: int | None, device: torch.device) -> int:
    """Return the number of decoding processes: beside a GPU several, on the CPU none (they would compete with it)."""
    if asked is not None:
        return asked
    return min(8, torch.get_num_threads()) if device.type == "cuda" else 0


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


class _Run:
    """One pass that fills what a store lacks."""

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
        missing = self._writer.missing()
        if not missing:
            say("the store is complete: nothing to do")
            return
        # Views recorded with another batch size are filled in a pass of their own: bytes depend on the batch size.
        by_batch_size: dict[int, list[MissingShard]] = defaultdict(list)
        for shard in missing:
            by_batch_size[self._writer.batch_size(shard.teacher, shard.view)].append(shard)
        total = sum(shard.count for shard in missing)
        with progress("extracting", total, "targets") as tick, CommitQueue(self._writer) as commits:
            for batch_size, shards in by_batch_size.items():
                self._fill(shards, batch_size, commits, tick)
        for target in {(shard.teacher, shard.view) for shard in missing}:
            self._writer.note_provenance(*target, self._provenance(target, missing))

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

    def _provenance(self, target: Target, missing: Iterable[MissingShard]) -> dict[str, Any]:
        key, _ = target
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else platform.machine()
        taught = self._teachers[key].provenance()
        return {
            **taught,
            "host": socket.gethostname(),
            "device": device,
            "versions": {**taught["versions"], "python": platform.python_version()},
            "samples": sum(s.count for s in missing if (s.teacher, s.view) == target),
            "teacher_seconds_all_views": round(self.seconds[key], 3),
        }


def _collate_decoded(items: list[tuple[int, dict[tuple[View, TeacherInput], NDArray[np.uint8]]]]) -> _Decoded:
    rows = [row for row, _ in items]
    keys = items[0][1]
    return _Decoded(rows, {key: torch.from_numpy(np.stack([images[key] for _, images in items])) for key in keys})
