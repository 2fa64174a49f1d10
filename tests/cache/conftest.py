"""A factory of tiny stores: numpy-made outputs, no teacher, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.plan import StorePlan, TeacherPlan
from cache.samples import SampleEntry
from cache.writer import MissingShard, StoreWriter, open_writer
from data.geometry import View

OUTPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "dino": {"features": (3, 2, 5)},
    "clip": {"logits": (4,), "embeddings": (6,)},
}


class TinyStores:
    """Builds stores below a folder. Every value follows from teacher, view, array and row alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def samples(self, count: int) -> list[SampleEntry]:
        return [
            SampleEntry(f"VOC2007/{n:06d}", 300 + n, 400 + n, hashlib.sha256(b"image %d" % n).hexdigest())
            for n in range(1, count + 1)
        ]

    def teacher(self, key: str, **changes: Any) -> TeacherPlan:
        plan = TeacherPlan(
            key=key,
            identity={"spec": key, "input_size": [420, 420], "normalisation": {"mean": [0.485, 0.456, 0.406]}},
            untrained=True,
            probe=np.linspace(-1, 1, 8, dtype=np.float32),
            outputs=OUTPUTS[key.split("-")[0]],
            text_embeddings=self.values(key, "original", "text", range(4), (6,)) if key == "clip" else None,
        )
        return dataclasses.replace(plan, **changes)

    def plan(
        self,
        num_samples: int = 7,
        *,
        teachers: Sequence[str | TeacherPlan] = ("dino", "clip"),
        views: Sequence[View] = ("original", "hflip"),
        **changes: Any,
    ) -> StorePlan:
        plan = StorePlan(
            sets=("2007:train",),
            limit=None,
            samples=self.samples(num_samples),
            teachers=[self.teacher(key) if isinstance(key, str) else key for key in teachers],
            views=views,
            feature_dtype="float16",
            shard_samples=3,
            batch_size=None,
        )
        return dataclasses.replace(plan, **changes)

    def values(
        self, teacher: str, view: str, name: str, rows: Iterable[int], shape: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        """What the teacher says of these rows, before it is cast to the stored dtype."""
        shape = OUTPUTS[teacher.split("-")[0]][name] if shape is None else shape
        seed = zlib.crc32(f"{teacher}/{view}/{name}".encode())
        return np.stack([np.random.default_rng([seed, row]).normal(size=shape) for row in rows]).astype(np.float32)

    def outputs(self, missing: MissingShard) -> dict[str, NDArray[np.float32]]:
        rows = range(missing.first, missing.first + missing.count)
        names = OUTPUTS[missing.teacher.split("-")[0]]
        return {name: self.values(missing.teacher, missing.view, name, rows) for name in names}

    def fill(self, writer: StoreWriter, limit: int | None = None) -> None:
        for missing in writer.missing()[:limit]:
            writer.commit(missing, self.outputs(missing))

    def build(self, plan: StorePlan | None = None, name: str = "store.zarr", limit: int | None = None) -> Path:
        """Create or resume a store and commit what it lacks, or the first `limit` ranges of that."""
        with open_writer(self.folder / name, plan or self.plan()) as writer:
            self.fill(writer, limit)
        return self.folder / name


def tree(store: Path) -> dict[str, bytes]:
    """The content of every file that two equal stores must share: all but the provenance."""
    files = (path for path in sorted(store.rglob("*")) if path.is_file() and path.name != "provenance.jsonl")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.fixture
def stores(tmp_path: Path) -> TinyStores:
    return TinyStores(tmp_path)


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of seven samples in shards of three. Shared by all tests: read only."""
    return TinyStores(tmp_path_factory.mktemp("whole")).build()


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy of the complete store, to damage."""
    return Path(shutil.copytree(whole_store, tmp_path / "copy.zarr"))


@pytest.fixture(scope="session")
def tree_of() -> Callable[[Path], dict[str, bytes]]:
    return tree
