"""Stores of random numbers, made through the writer alone, and processes that start with nothing of this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.plan import StorePlan, TeacherPlan
from cache.reader import ArrayReader, TeacherStore
from cache.samples import SampleEntry
from cache.writer import MissingShard, open_writer

PROJECT = Path(__file__).resolve().parents[1]
# DINOv2 ViT-S/14 on the 30 × 30 grid, in float16.
SAMPLE_SHAPE = (30, 30, 384)
SAMPLE_BYTES = 30 * 30 * 384 * 2
SHARD_SAMPLES = 64
FEATURES = Path("bench/original/features")


def feature_plan(samples: int, shape: tuple[int, ...] = SAMPLE_SHAPE, shard_samples: int = SHARD_SAMPLES) -> StorePlan:
    """Return the plan of a store of one feature teacher and one view, [samples, *shape] float16."""
    teacher = TeacherPlan("bench", {"spec": "random numbers"}, True, np.ones(1, np.float32), {"features": shape})
    return StorePlan(
        sets=("2007:bench",),
        limit=None,
        samples=[SampleEntry(f"VOC2007/{row:06d}", 480, 480, f"{row:064x}") for row in range(samples)],
        teachers=[teacher],
        views=("original",),
        feature_dtype="float16",
        shard_samples=shard_samples,
        batch_size=None,
    )


def random_features(missing: MissingShard, shape: tuple[int, ...] = SAMPLE_SHAPE) -> dict[str, NDArray[np.float32]]:
    """Return random outputs [count, *shape] for a range of samples."""
    generator = np.random.default_rng(missing.first)
    return {"features": generator.standard_normal((missing.count, *shape), dtype=np.float32)}


def build_store(path: Path, plan: StorePlan) -> Path:
    """Return the path of the complete store that was written there."""
    (teacher,) = plan.teachers
    with open_writer(path, plan) as writer:
        for missing in writer.missing():
            writer.commit(missing, random_features(missing, teacher.outputs["features"]))
    return path


def reader_of(store: Path, *, check: bool = True) -> ArrayReader:
    """Return our reader of a store's features."""
    return TeacherStore(store, check=check).array("bench", "original", "features")


def in_fresh_process(module: str, *arguments: object) -> Any:
    """Return what a module of this folder prints as JSON when it is run by itself."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)
