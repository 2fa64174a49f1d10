"""A teacher by itself: batch sizes, ways of running it, and what lower precision costs in fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.extraction_stages import Setting
from benchmarks.rounds import in_turn, timed
from benchmarks.tables import Table, markdown
from data.images import decode_image, squash
from data.records import ImageRecord
from features.registry import Precision, build_teacher
from features.teacher import Teacher
from pipeline.teachers import named_specs

BATCH_SIZES = {"cpu": (1, 4, 16), "cuda": (1, 16, 64, 256)}
MAX_COMPARED = 16


def batch_table(teachers: Mapping[str, Teacher], setting: Setting) -> Table:
    """Return the table of ms an image by batch size."""
    sizes = BATCH_SIZES[setting.device.type]
    rows = []
    for key, teacher in teachers.items():
        images = _images(teacher, setting.records, max(sizes)).to(setting.device)
        found = in_turn({str(size): _pass(teacher, images[:size], setting) for size in sizes}, setting.rounds)
        rows.append([key, *(f"{1000 * median(found[str(size)]):.1f}" for size in sizes)])
    return Table("Batch sizes: ms an image, teacher alone", markdown(["", *map(str, sizes)], rows))


def variant_table(teacher: Teacher, setting: Setting) -> Table:
    """Return the time of a feature teacher as it is run, beside channels-last input and `torch.compile`."""
    size = BATCH_SIZES[setting.device.type][1]
    images = _images(teacher, setting.records, size).to(setting.device)
    plain = teacher.module
    compiled: Any = torch.compile(plain)
    ways: dict[str, Callable[[], Any]] = {
        "as it is": lambda: plain,
        "channels last": lambda: plain.to(memory_format=torch.channels_last),
        "torch.compile": lambda: compiled,
    }

    def way(name: str) -> Callable[[int], float]:
        def run(_: int) -> float:
            teacher.module = ways[name]()
            teacher(images[:1] if name != "torch.compile" else images)
            seconds = _pass(teacher, images, setting)(0)
            teacher.module = plain.to(memory_format=torch.contiguous_format)
            return seconds

        return run

    found = in_turn({name: way(name) for name in ways}, setting.rounds)
    ratios = {n: median([a / b for a, b in zip(v, found["as it is"], strict=True)]) for n, v in found.items()}
    rows = [[name, f"{1000 * median(found[name]):.1f}", f"{ratios[name]:.2f}"] for name in ways]
    return Table(f"{teacher.name}, batches of {size}: ways to run it", markdown(["", "ms an image", "ratio"], rows))


def precision_table(specs: Sequence[str], weights: Mapping[str, Path], setting: Setting) -> Table:
    """Return cosine to float32 and time of every teacher in bfloat16 and float16.

    Cosines are per token of features, per image of embeddings.
    """
    rows = []
    for key, spec in named_specs(specs).items():
        reference: Tensor | None = None
        base = 0.0
        for precision in ("float32", "bfloat16", "float16"):
            teacher = _built(spec, weights, precision).to(setting.device)
            images = _images(teacher, setting.records, min(MAX_COMPARED, len(setting.records))).to(setting.device)
            said = teacher(images).arrays()
            vectors = said.get("features", said.get("embeddings"))
            assert vectors is not None
            teacher(images[:1])
            seconds = median(_pass(teacher, images, setting)(0) for _ in range(setting.rounds))
            if reference is None:
                reference, base = vectors, seconds
                continue
            cosines = nn.functional.cosine_similarity(vectors.double(), reference.double(), dim=-1).cpu().numpy()
            low = float(np.percentile(cosines, 1))
            rows.append([key, precision, f"{cosines.mean():.6f}", f"{low:.6f}", f"{seconds / base:.2f}"])
    header = ["", "precision", "cosine, mean", "cosine, p01", "time"]
    return Table("Lower precision beside float32", markdown(header, rows))


def _built(spec: str, weights: Mapping[str, Path], precision: Precision) -> Teacher:
    path = weights.get(spec)
    return build_teacher(spec, weights=path, untrained=path is None, precision=precision)


def _images(teacher: Teacher, records: Sequence[ImageRecord], count: int) -> Tensor:
    """Return so many of the images at the teacher's size, [count, H, W, 3] uint8; from the first on again if needed."""
    shown = [squash(decode_image(record), teacher.input.size, teacher.input.resample) for record in records[:count]]
    return torch.from_numpy(np.stack([shown[index % len(shown)] for index in range(count)]))


def _pass(teacher: Teacher, images: Tensor, setting: Setting) -> Callable[[int], float]:
    def run() -> None:
        teacher(images)
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)

    return lambda _: timed(run) / len(images)
