"""Whatever shape, dtype, geometry and ids: what is written is what we read, and what zarr-python or h5py reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.plan import StorePlan, TeacherPlan
from cache.reader import ArrayReader, TeacherStore
from cache.samples import SampleEntry
from cache.verify import find_problems
from cache.writer import MissingShard, open_writer
from data.geometry import VIEWS, View
from tests.cache.power_loss import folder_in_memory

AXIS = st.integers(1, 4)
Shapes = dict[str, tuple[int, ...]]


def outputs(features: tuple[int, ...] | None, logits: int | None, embeddings: int | None) -> Shapes:
    """What a teacher puts out: shapes by array name."""
    found: Shapes = {} if features is None else {"features": features}
    return found | {n: (width,) for n, width in (("logits", logits), ("embeddings", embeddings)) if width is not None}


WIDTH = st.none() | st.integers(1, 7)
TEACHER = st.builds(outputs, st.none() | st.tuples(AXIS, AXIS, AXIS), WIDTH, WIDTH).filter(bool)
KEY = st.from_regex(r"[a-z0-9][a-z0-9_.\-]{0,12}", fullmatch=True).filter(lambda k: k not in ("pca", "text_embeddings"))
# What a devkit's file names may hold and what JSON, Zarr and a terminal take for something else.
IDS = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["VOC2007/000005", "with space", "/slash/", "..", "\"quoted'", "back\\slash", "ünïcödé", "日本", "line\nbreak",
     "\0", "\udcff", "{}", "null", "\u2028", "😀", "a" * 300]
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> StorePlan:
    ids = draw(st.lists(IDS, min_size=1, max_size=9, unique=True))
    teachers = draw(st.dictionaries(KEY, TEACHER, min_size=1, max_size=3))
    text = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return StorePlan(
        sets=("2007:train",),
        limit=draw(st.none() | st.integers(1, 9)),
        samples=[SampleEntry(name, draw(st.integers(1, 9999)), draw(st.integers(1, 9999)), "0" * 64) for name in ids],
        teachers=[
            TeacherPlan(
                key=key,
                identity={
                    "spec": draw(st.text(max_size=5)),
                    "mean": draw(st.floats(allow_nan=False, allow_infinity=False)),
                },
                untrained=draw(st.booleans()),
                probe=np.ones(3, np.float32),
                outputs=shapes,
                text_embeddings=random_values(key, text, "float32") if "logits" in shapes else None,
            )
            for key, shapes in teachers.items()
        ],
        views=draw(st.lists(st.sampled_from(VIEWS), min_size=1, unique=True)),
        feature_dtype=draw(st.sampled_from(["float16", "float32"])),
        shard_samples=draw(st.integers(1, 10)),
        batch_size=draw(st.none() | st.integers(1, 32)),
        format=draw(st.sampled_from(["zarr", "hdf5"])),
    )


def random_values(seed: Any, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    generator = np.random.default_rng(list(repr(seed).encode()))
    return generator.normal(0, 100, size=shape).astype(dtype)


def said(plan: StorePlan, teacher: TeacherPlan, view: View, name: str) -> NDArray[Any]:
    """What the teacher says of all samples, as it must be stored."""
    dtype = plan.feature_dtype if name == "features" else "float32"
    return random_values((teacher.key, view, name), (len(plan.samples), *teacher.outputs[name]), dtype)


def outputs_of(plan: StorePlan, missing: MissingShard) -> dict[str, NDArray[Any]]:
    teacher = next(teacher for teacher in plan.teachers if teacher.key == missing.teacher)
    rows = slice(missing.first, missing.first + missing.count)
    return {name: said(plan, teacher, missing.view, name)[rows] for name in teacher.outputs}


def write(path: Path, plan: StorePlan, order: list[int], stop: int) -> None:
    """Write the store in two runs, ranges in any order."""
    for limit in (stop, None):
        with open_writer(path, plan) as writer:
            missing = sorted(writer.missing(), key=lambda m: order[m.shard % len(order)])
            for each in missing[:limit]:
                writer.commit(each, outputs_of(plan, each))


@contextmanager
def referee(path: Path) -> Iterator[Any]:
    """The store as the format's own library opens it: arrays by path."""
    if path.is_dir():
        yield zarr.open_group(path, mode="r")
    else:
        with h5py.File(path, "r") as file:
            yield file


def check(plan: StorePlan, order: list[int], stop: int) -> None:
    with folder_in_memory() as folder:
        path = folder / ("store.h5" if plan.format == "hdf5" else "store.zarr")
        write(path, plan, order, stop)
        store = TeacherStore(path)
        assert find_problems(store.catalog, verify=True) == []
        assert store.catalog.samples == plan.samples
        assert store.row_of_id == {sample.id: row for row, sample in enumerate(plan.samples)}
        with referee(path) as theirs:
            for teacher in plan.teachers:
                assert store.catalog.teacher(teacher.key).manifest.identity == teacher.identity
                for view, name in product(plan.views, teacher.outputs):
                    array = theirs[f"{teacher.key}/{view}/{name}"][...]
                    assert_equal(store.array(teacher.key, view, name), array, said(plan, teacher, view, name))
                if teacher.text_embeddings is not None:
                    for text in (store.text_embeddings(teacher.key), theirs[f"{teacher.key}/text_embeddings"][...]):
                        np.testing.assert_array_equal(text, teacher.text_embeddings)


def assert_equal(reader: ArrayReader, theirs: NDArray[Any], expected: NDArray[Any]) -> None:
    rows = range(len(expected))
    for found in (reader.gather(rows), np.stack([reader.read(row) for row in rows]), theirs):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


EXAMPLE = {"plan": plans(), "order": st.permutations(range(4)), "stop": st.integers(0, 12)}


@settings(max_examples=25)
@given(**EXAMPLE)
def test_what_is_written_is_read_by_us_and_by_the_formats_library(plan: StorePlan, order: list[int], stop: int) -> None:
    check(plan, order, stop)


@pytest.mark.slow
@settings(max_examples=600)
@given(**EXAMPLE)
def test_many_stores_are_read_by_us_and_by_the_formats_library(plan: StorePlan, order: list[int], stop: int) -> None:
    check(plan, order, stop)
