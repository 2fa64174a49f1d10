"""The extraction of each teacher, and of all together, beside its parts run alone: what overlaps and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.rounds import in_turn, timed
from benchmarks.tables import Check, Table, markdown
from cache.plan import StorePlan
from cache.samples import SampleEntry
from cache.writer import open_writer
from data.geometry import VIEWS
from data.records import ImageRecord
from features.teacher import Teacher
from pipeline.batch_size import find_batch_size
from pipeline.decoding import DecodeJob, Decoder, collate_decoded
from pipeline.extract import digest_images, teacher_plan
from pipeline.fill import Filling
from pipeline.loading import load_batches
from pipeline.stage_times import StageTimes

SHARD_SAMPLES = 64
ONE_EPOCH_VIEWS = 1  # a student sees each image once an epoch, in one view


@dataclass(frozen=True)
class Setting:
    """Where and on what all tables are measured."""

    folder: Path
    records: Sequence[ImageRecord]
    device: torch.device
    workers: int
    rounds: int

    @property
    def at_most(self) -> float:
        """The target of the pipeline's time over that of its slowest part."""
        return 1.1 if self.device.type == "cpu" else 1.2


def stage_tables(setting: Setting, teachers: Mapping[str, Teacher]) -> list[Table]:
    """Return the pipeline beside its parts, and what it costs beside live teachers, of each teacher and of all."""
    groups = {key: {key: teacher} for key, teacher in teachers.items()}
    if len(teachers) > 1:
        groups["all together"] = dict(teachers)
    measured = {name: _Extraction(setting, group) for name, group in groups.items()}
    rows, checks, where, costs = [], [], [], []
    for name, extraction in measured.items():
        found = extraction.run()
        ratios = [p / max(parts) for p, *parts in zip(*found.values(), strict=True)]
        seconds = {part: median(values) for part, values in found.items()}
        target = f"≤ {setting.at_most}"
        checks.append(Check(name, median(ratios), target, median(ratios) <= setting.at_most))
        images = len(setting.records)
        rows.append([name, *(f"{1000 * s / images:.1f}" for s in seconds.values()), f"{median(ratios):.2f}", target])
        shares = extraction.times.shares
        where.append([
            name, f"{images / seconds['pipeline']:.2f}", extraction.times.bottleneck,
            *(f"{shares[stage]:.0%}" for stage in shares),
        ])  # fmt: skip
        costs.append(_cost(name, images, seconds))
    return [
        Table(
            "The pipeline beside its parts, ms an image, both views",
            markdown(["", "pipeline", "teacher", "decode", "disk", "ratio", "target"], rows),
            tuple(checks),
        ),
        Table(
            "Where the pipeline's time goes",
            markdown(["", "images/s", "bottleneck", "decode", "teacher", "copy", "disk"], where),
        ),
        Table(
            "Extracting once beside live teachers in every epoch",
            markdown(["", "extraction, s", "live, s an epoch", "pays after, epochs"], costs),
        ),
    ]


def _cost(name: str, images: int, seconds: Mapping[str, float]) -> list[str]:
    live = seconds["teacher"] * ONE_EPOCH_VIEWS / len(VIEWS)
    return [name, f"{seconds['pipeline']:.1f}", f"{live:.1f}", f"{seconds['pipeline'] / live:.1f}"]


class _Extraction:
    """One group of teachers over the setting's images."""

    def __init__(self, setting: Setting, teachers: dict[str, Teacher]) -> None:
        self._setting = setting
        self._teachers = teachers
        self._samples: list[SampleEntry] = digest_images(setting.records)
        self._batch_size = find_batch_size(teachers.values(), setting.device, SHARD_SAMPLES)
        self._plans = [teacher_plan(key, teacher) for key, teacher in teachers.items()]
        self.times = StageTimes()

    def run(self) -> dict[str, tuple[float, ...]]:
        """Return the seconds of the pipeline and of its parts, one a round."""
        passes = {
            "pipeline": lambda _: self._pipeline(),
            "teacher": lambda _: self._teacher(),
            "decode": lambda _: timed(self._decode),
            "disk": lambda _: self._disk(),
        }
        self._teacher_warm_up()
        return in_turn(passes, self._setting.rounds)

    def _pipeline(self) -> float:
        out = self._setting.folder / "bench.zarr"
        setting = self._setting
        with open_writer(out, self._plan()) as writer:
            filling = Filling(writer, setting.records, self._samples, self._teachers, setting.device, setting.workers)
            filling.fill()
        self.times = filling.times
        shutil.rmtree(out)
        return self.times.wall

    def _plan(self) -> StorePlan:
        return StorePlan(
            sets=("2007:bench",), limit=None, samples=self._samples, teachers=self._plans, views=VIEWS,
            feature_dtype="float16", shard_samples=SHARD_SAMPLES, batch_size=self._batch_size,
        )  # fmt: skip

    def _batches(self) -> list[list[DecodeJob]]:
        wanted = tuple(dict.fromkeys((view, teacher.input) for view in VIEWS for teacher in self._teachers.values()))
        rows = range(len(self._setting.records))
        batches = []
        for first in range(0, len(rows), SHARD_SAMPLES):
            shard = rows[first : first + SHARD_SAMPLES]
            batches += [shard[start : start + self._batch_size] for start in range(0, len(shard), self._batch_size)]
        return [[DecodeJob(row, wanted) for row in batch] for batch in batches]

    def _decode(self) -> None:
        setting = self._setting
        decoder = Decoder(setting.records, self._samples)
        for _ in load_batches(
            decoder.decode, self._batches(), collate_decoded, workers=setting.workers, device=setting.device
        ):
            pass

    def _teacher_warm_up(self) -> None:
        for teacher in self._teachers.values():
            teacher(torch.zeros((1, *teacher.input.size, 3), dtype=torch.uint8, device=self._setting.device))

    def _teacher(self) -> float:
        sizes = [len(batch) for batch in self._batches()]
        inputs = {
            teacher.input: torch.randint(
                0, 256, (max(sizes), *teacher.input.size, 3), dtype=torch.uint8, device=self._setting.device
            )
            for teacher in self._teachers.values()
        }

        def run() -> None:
            for size in sizes:
                for teacher in self._teachers.values():
                    for _ in VIEWS:
                        teacher(inputs[teacher.input][:size])
            if self._setting.device.type == "cuda":
                torch.cuda.synchronize(self._setting.device)

        return timed(run)

    def _disk(self) -> float:
        """Write the store's bytes plainly, shard by shard, each flushed."""
        content = os.urandom(1 << 20) * (self._plan().planned_bytes() // (1 << 20) + 1)
        num_files = len(VIEWS) * -(-len(self._setting.records) // SHARD_SAMPLES)
        parts = [part.tobytes() for part in np.array_split(np.frombuffer(content, dtype=np.uint8), num_files)]

        def write() -> None:
            for part in parts:
                with (self._setting.folder / "plain").open("wb", buffering=0) as file:
                    file.write(part)
                    os.fsync(file.fileno())

        return timed(write)
