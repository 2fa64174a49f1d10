"""What a derived store is made from: a source's arrays, stored or as numbers, and the PCA basis of its features.

R: components kept. C: channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.canonical import digest
from cache.catalog import Catalog
from cache.compatibility import refuse_other_basis
from cache.encoding import decode
from cache.layout import PCA, SCALES
from cache.manifest import PcaManifest
from cache.pca import Pca, PcaFit
from cache.plan import constant_digest
from cache.reader import ArrayReader, read_constant
from data.errors import StoreCorruptError, UsageError
from data.geometry import View


class ViewReader:
    """One view of a teacher, read as it is stored or as numbers, checksums checked. Not to be used by two threads."""

    def __init__(self, catalog: Catalog, teacher: str, view: View) -> None:
        layouts = catalog.teacher(teacher).view(view).layouts
        self.arrays = {name: ArrayReader(catalog.storage.array(layout)) for name, layout in layouts.items()}
        self._of_features = [name for name in ("features", *sorted(SCALES)) if name in layouts]

    def features(self, row: int) -> NDArray[np.floating]:
        """Return one sample's features [Gh, Gw, C] as numbers: float16 or float32."""
        return decode({name: self.arrays[name].read(row) for name in self._of_features})

    def stored(self, name: str, rows: Sequence[int]) -> NDArray[Any]:
        """Return the given rows of an array as they are stored, copied."""
        return self.arrays[name].gather(rows)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Ask the kernel to read the given rows in the background."""
        for array in self.arrays.values():
            array.prefetch(rows)

    def num_bytes(self) -> int:
        """Return the bytes of the view's committed shards, checksums and indices included."""
        return sum(e.num_bytes for array in self.arrays.values() for e in array.storage.read_ledger().values())


@contextmanager
def reading(catalog: Catalog) -> Iterator[None]:
    """Name the store in what is said of damage that the block comes upon: a conversion has two of them open."""
    try:
        yield
    except StoreCorruptError as error:
        hint = f"see all damage: python cli.py inspect-cache {catalog.path} --verify"
        raise StoreCorruptError(f"{catalog.path}: {error.message}", hint=hint) from error


@dataclass(frozen=True, eq=False)
class Basis:
    """A PCA basis. values: [1 + R, C] float32, the mean, then R components."""

    manifest: PcaManifest
    values: NDArray[np.float32]

    @property
    def pca(self) -> Pca:
        """The map there and back. What each component explains is not kept, and no projection needs it."""
        return Pca(self.values[0], self.values[1:], np.zeros(len(self.values) - 1, dtype=np.float32))


@dataclass(frozen=True)
class BasisRequest:
    """The PCA that is asked for. shape: (1 + R, C).  rows: of the source's samples to fit it on, ascending."""

    catalog: Catalog
    teacher: str
    shape: tuple[int, int]
    rows: Sequence[int]

    def ids_digest(self) -> str:
        """Return the SHA-256 over the ids of the samples, in row order."""
        return digest([self.catalog.samples[row].id for row in self.rows])


def fit_rows(catalog: Catalog, fit_ids: Collection[str] | None) -> list[int]:
    """Return the rows of the samples with these ids, of all where None, ascending.

    Raises UsageError where the store holds none of them.
    """
    rows = [row for row, sample in enumerate(catalog.samples) if fit_ids is None or sample.id in fit_ids]
    if not rows:
        held = catalog.root.dataset
        raise UsageError(
            f"--fit-set: none of its {len(fit_ids or ())} images is in {catalog.path}, which holds"
            f" {held.samples} images of {'+'.join(held.sets)}",
            hint="name a set that the store holds, or leave --fit-set out to fit on all its images",
        )
    return rows


def stored_basis(out: Catalog, asked: BasisRequest) -> Basis | None:
    """Return the basis that a derived store already has of a teacher, None where it lacks the teacher.

    Raises StoreStaleError where it has another number of components or was fitted on other samples.
    """
    found = out.teachers.get(asked.teacher)
    if found is None:
        return None
    fields = {"shape": list(asked.shape), "fit_samples": len(asked.rows), "fit_samples_sha256": asked.ids_digest()}
    refuse_other_basis(out.path, found, fields)
    assert found.manifest.pca is not None
    with reading(out):
        return Basis(found.manifest.pca, read_constant(out.storage, found, PCA))


def fit_basis(asked: BasisRequest, tick: Callable[[int], None] = lambda _: None) -> Basis:
    """Return the basis of a teacher's features of the `original` view, fitted on the given rows in their order.

    Raises UsageError where the rows hold fewer tokens than components are asked for.
    """
    reader = ViewReader(asked.catalog, asked.teacher, "original")
    components = asked.shape[0] - 1
    num_tokens = len(asked.rows) * int(np.prod(reader.arrays["features"].layout.sample_shape[:2]))
    if num_tokens < components:
        raise UsageError(
            f"--pca: expected at least {components} tokens of {asked.teacher} to fit {components} components on,"
            f" found {num_tokens}",
            hint="ask for fewer, or fit on more images (--fit-set)",
        )
    fit = PcaFit(asked.shape[1])
    # Sample by sample: the sums do not depend on how the source is cut into shards.
    for row in asked.rows:
        with reading(asked.catalog):
            fit.update(reader.features(row))
        tick(1)
    pca = fit.solve(components)
    values = np.concatenate([pca.mean[np.newaxis], pca.components])
    manifest = PcaManifest(
        shape=asked.shape,
        sha256=constant_digest(values),
        fit_samples=len(asked.rows),
        fit_samples_sha256=asked.ids_digest(),
        explained_variance=min(1.0, float(pca.explained.sum(dtype=np.float64))),
    )
    return Basis(manifest, values)
