"""Stage 1: runs frozen teachers over an image set, once, and writes what they say to a store.

Every image is decoded once for all teachers and views; each teacher gets one antialiased resize from the original.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cache.manifest import StoredDtype, check_teacher_key
from cache.plan import StoreFormat, StorePlan, TeacherPlan
from cache.repair import Repair
from cache.samples import SampleEntry
from cache.writer import StoreWriter, open_writer, refuse_other_images
from data.errors import UsageError
from data.geometry import VIEWS, View
from data.images import image_digest, read_image_bytes
from data.records import ImageRecord
from data.voc import read_voc
from features.registry import build_teacher
from features.teacher import Teacher, probe
from pipeline.byte_progress import megabytes
from pipeline.device import choose_device
from pipeline.fill import Filling
from pipeline.progress import progress, say

DEFAULT_TEACHERS = ("dinov2_vits14", "clip_vitb32")


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
    format: StoreFormat | None = None
    repair: bool = False


@dataclass(frozen=True)
class Extraction:
    """What an extraction did.

    samples: images of the store.  computed: teacher × view × image outputs of this run.  repaired: damaged shards that
    were written again.
    """

    store: Path
    samples: int
    computed: int
    seconds: float
    seconds_by_teacher: dict[str, float]
    untrained: tuple[str, ...]
    repaired: tuple[Repair, ...]


def extract(config: ExtractConfig) -> Extraction:
    """Make or resume the store that the configuration asks for.

    Raises UsageError, DatasetError, TeacherError or one of the store's errors; whatever was committed stays.
    """
    device = choose_device(config.device)
    records = read_voc(config.voc_root, config.voc_sets, config.limit)
    start = time.monotonic()
    samples = digest_images(records)
    images = StorePlan(
        sets=config.voc_sets,
        limit=config.limit,
        samples=samples,
        teachers=(),
        views=config.views,
        feature_dtype=config.dtype,
        shard_samples=config.shard_samples,
        batch_size=config.batch_size,
        format=config.format,
    )
    if not config.repair:
        refuse_other_images(config.out, images)
    teachers = build_teachers(config.teachers, config.weights, config.untrained, device)
    plan = replace(images, teachers=[teacher_plan(key, teacher) for key, teacher in teachers.items()])
    with ExitStack() as held:
        writer = _open(held, config, plan)
        run = Filling(writer, records, samples, teachers, device, workers_for(config.workers, device))
        run.fill()
    return Extraction(
        store=config.out,
        samples=len(records),
        computed=run.computed,
        seconds=time.monotonic() - start,
        seconds_by_teacher=dict(run.seconds),
        untrained=tuple(key for key, teacher in teachers.items() if teacher.untrained),
        repaired=tuple(writer.repaired),
    )


def _open(held: ExitStack, config: ExtractConfig, plan: StorePlan) -> StoreWriter:
    if not config.repair:
        return held.enter_context(open_writer(config.out, plan))
    with megabytes("verifying", plan.planned_bytes()) as advance:
        return held.enter_context(open_writer(config.out, plan, repair=True, progress=advance))


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
