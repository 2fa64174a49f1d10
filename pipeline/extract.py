"""Stage 1: runs frozen teachers over an image set, once, and writes what they say to a store.

Every image is decoded once for all teachers and views; each teacher gets one antialiased resize from the original.
Several processes may share the work (`torchrun`): each fills shards of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cache.manifest import StoredDtype
from cache.plan import StoreFormat, StorePlan, TeacherPlan
from cache.ranks import Ranks, by_first, exchange
from cache.repair import Repair
from cache.samples import SampleEntry
from cache.writer import StoreWriter, open_writer, refuse_other_images
from data.geometry import VIEWS, View
from data.images import image_digest, read_image_bytes
from data.records import ImageRecord
from data.voc import read_voc
from features.prompt_file import read_prompts
from features.registry import Precision
from features.teacher import Teacher, probe
from pipeline.batch_size import find_batch_size
from pipeline.byte_progress import megabytes
from pipeline.device import choose_device
from pipeline.fill import Filling
from pipeline.progress import progress
from pipeline.stage_times import StageTimes
from pipeline.teacher_check import note_logit_maps
from pipeline.teachers import DEFAULT_TEACHERS, TeacherChoices, build_teachers, check_specs
from pipeline.torch_ranks import joined_ranks, local_device


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
    precision: Precision = "float32"
    prompts: Path | None = None
    limit: int | None = None
    format: StoreFormat | None = None
    repair: bool = False


@dataclass(frozen=True)
class Extraction:
    """What an extraction did, as this process knows it.

    rank: its number among those that worked together.  samples: images of the store.  computed: teacher × view × image
    outputs of this run, over all ranks.  times: of this rank.  repaired: damaged shards that were written again.
    """

    store: Path
    rank: int
    samples: int
    computed: int
    seconds: float
    seconds_by_teacher: dict[str, float]
    times: StageTimes
    untrained: tuple[str, ...]
    repaired: tuple[Repair, ...]


def extract(config: ExtractConfig) -> Extraction:
    """Make or resume the store that the configuration asks for; all processes of a torchrun job do it together.

    Raises UsageError, DatasetError, TeacherError or one of the store's errors; whatever was committed stays.
    """
    with joined_ranks() as ranks:
        return _extract(config, ranks)


def _extract(config: ExtractConfig, ranks: Ranks) -> Extraction:
    check_specs(config.teachers)
    device = choose_device(local_device(config.device))
    prompts = None if config.prompts is None else read_prompts(config.prompts)
    records = read_voc(config.voc_root, config.voc_sets, config.limit)
    start = time.monotonic()
    images = by_first(ranks, lambda: _image_plan(config, records))
    choices = TeacherChoices(
        config.weights, config.untrained, config.precision, None if prompts is None else prompts.prompts
    )
    teachers = _build_in_turn(ranks, config.teachers, choices, device)
    found = None if config.batch_size else find_batch_size(teachers.values(), device, config.shard_samples)
    plan = replace(
        images,
        teachers=[teacher_plan(key, teacher) for key, teacher in teachers.items()],
        default_batch_size=min(size for size in exchange(ranks, found or images.default_batch_size)),
    )
    with ExitStack() as held:
        writer = _open(held, config, plan, ranks)
        run = Filling(writer, records, images.samples, teachers, device, workers_for(config.workers, device), prompts)
        run.fill()
        computed = sum(exchange(ranks, run.computed))
        by_first(ranks, lambda: note_logit_maps(writer, records))
    return Extraction(
        store=config.out,
        rank=ranks.rank,
        samples=len(records),
        computed=computed,
        seconds=time.monotonic() - start,
        seconds_by_teacher=dict(run.teacher_seconds),
        times=run.times,
        untrained=tuple(key for key, teacher in teachers.items() if teacher.untrained),
        repaired=tuple(writer.repaired),
    )


def _image_plan(config: ExtractConfig, records: Sequence[ImageRecord]) -> StorePlan:
    """Return the plan without its teachers; other images than the store's are refused before any teacher is built."""
    plan = StorePlan(
        sets=config.voc_sets,
        limit=config.limit,
        samples=digest_images(records),
        teachers=(),
        views=config.views,
        feature_dtype=config.dtype,
        shard_samples=config.shard_samples,
        batch_size=config.batch_size,
        format=config.format,
    )
    if not config.repair:
        refuse_other_images(config.out, plan)
    return plan


def _build_in_turn(
    ranks: Ranks, specs: Sequence[str], choices: TeacherChoices, device: torch.device
) -> dict[str, Teacher]:
    """Build on the first rank, then on the others: what had to be downloaded is then in the hub's cache."""
    first: dict[str, Teacher] = {}
    by_first(ranks, lambda: first.update(build_teachers(specs, choices, device)))
    return first or build_teachers(specs, choices, device)


def _open(held: ExitStack, config: ExtractConfig, plan: StorePlan, ranks: Ranks) -> StoreWriter:
    if not config.repair:
        return held.enter_context(open_writer(config.out, plan, ranks=ranks))
    with megabytes("verifying", plan.planned_bytes()) as advance:
        return held.enter_context(open_writer(config.out, plan, ranks=ranks, repair=True, progress=advance))


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
