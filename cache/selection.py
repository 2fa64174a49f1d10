"""Which store and which row serves each image of a run: one store, or several joined by image id.

Teachers may come from different stores, and so may the images of one teacher: a store of VOC2007 and one of VOC2012.
One store is the composition of one. Images are addressed by their position among the run's ids.

Axes: n images of the run, Gh × Gw patch grid, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cache.agreement import Part, refuse_other_frame, refuse_other_images, refuse_unlike_parts
from cache.canonical import Json
from cache.commands import adding_views
from cache.image_arrays import is_image_store
from cache.layout import PCA, SCALES
from cache.manifest import TeacherManifest, ViewManifest
from cache.pca import Pca
from cache.reader import ArrayReader, TeacherStore, read_constant
from cache.selected_array import SelectedArray, ViewPlaces
from cache.source import Basis
from data.errors import StoreIncompleteError, UsageError
from data.geometry import FRAME_SIZE, View

_MAX_SHOWN = 5
# How many rows of moments are summed at once: 6 MB of a teacher of 768 channels.
_MOMENTS_AT_ONCE = 1024


class Selection:
    """The images of a run in one or several opened stores. Where several have the same, the first of them serves it.

    ids: of the run's images, each once.  digests: SHA-256 by id of every image that any of the stores has.
    outputs: names of the arrays of every teacher, by key.
    """

    def __init__(self, stores: Sequence[TeacherStore], ids: Sequence[str], *, called: str = "training images") -> None:
        """Find the images in the stores. called: what they are, for messages.

        Raises StoreStaleError for a store of another frame, or where two stores saw different images under one id;
        UsageError for a store of images.
        """
        self.stores = tuple(stores)
        self.ids = tuple(ids)
        self._called = called
        self.digests: dict[str, str] = {}
        self.outputs: dict[str, set[str]] = {}
        self._rows: list[NDArray[np.int64]] = []
        seen: list[tuple[TeacherStore, dict[str, str]]] = []
        for store in self.stores:
            _refuse_images(store)
            refuse_other_frame(store, FRAME_SIZE)
            rows, digests = store.rows_of(self.ids)
            for other, others in seen:
                refuse_other_images(other, others, store, digests)
            seen.append((store, digests))
            self._rows.append(rows)
            self.digests = {**digests, **self.digests}
            for key, teacher in store.catalog.teachers.items():
                names = {name for view in teacher.views.values() for name in view.layouts}
                self.outputs.setdefault(key, set()).update(names)

    @property
    def where(self) -> str:
        """What is read, for messages: `the store A`, `the stores A, B`."""
        return self._named(range(len(self.stores)))

    def _named(self, numbers: Sequence[int]) -> str:
        paths = [str(self.stores[number].catalog.path) for number in numbers]
        return f"the store{'s' * (len(paths) > 1)} {', '.join(paths)}"

    def manifest(self, teacher: str) -> TeacherManifest:
        """Return a teacher's manifest, that of the first store that has it; raises as `arrays`."""
        return self.stores[self._holding(teacher)[0]].catalog.teachers[teacher].manifest

    def text_embeddings(self, teacher: str) -> NDArray[np.float32]:
        """Return a teacher's text embeddings, [K, D]; raises as `arrays`, and StoreCorruptError for damaged ones."""
        return self.stores[self._holding(teacher)[0]].text_embeddings(teacher)

    def pca(self, teacher: str) -> Pca | None:
        """Return the PCA that a teacher's features are components of, None where they are its own channels.

        Raises as `arrays`, and StoreCorruptError where the basis is damaged.
        """
        catalog = self.stores[self._holding(teacher)[0]].catalog
        stored = catalog.teachers[teacher]
        if stored.manifest.pca is None:
            return None
        return Basis(stored.manifest.pca, read_constant(catalog.storage, stored, PCA)).pca

    def arrays(self, teacher: str, name: str, views: Sequence[View]) -> dict[str, SelectedArray]:
        """Return an array of a teacher over the given views, by name: int8 features with the scales that restore them.

        Raises StoreIncompleteError where the stores lack the teacher, a view, an image or a committed shard of it;
        StoreStaleError where they hold different teachers under its key.
        """
        holding = {view: self._holding(teacher, view, name) for view in views}
        pairs = [(number, view) for view, numbers in holding.items() for number in numbers]
        number, view = pairs[0]
        dtype = self._manifest(number, teacher, view).arrays[name].dtype
        names = (name, *sorted(SCALES)) if dtype == "int8" else (name,)
        refuse_unlike_parts([Part(self.stores[number], teacher, view, (name,)) for number, view in pairs])
        return {
            each: SelectedArray({view: self._places(teacher, view, each, holding[view]) for view in views})
            for each in names
        }

    def channel_statistics(self, teacher: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean and the scale of a teacher's channels, each [C], over all cells of the run's images.

        They are those of the `original` view, so that every view is standardised alike. A channel's scale is its
        standard deviation. Where features were projected on a PCA basis, all channels have one scale, the root of
        their mean variance: a scale for each would whiten them, which is another loss.  Raises as `arrays`.
        """
        moments = self.arrays(teacher, "moments", ("original",))["moments"]
        first = self._manifest(self._holding(teacher, "original", "moments")[0], teacher, "original")
        grid_rows, grid_columns, _ = first.arrays["features"].sample_shape
        total = np.zeros(moments.sample_shape)
        for start in range(0, len(self.ids), _MOMENTS_AT_ONCE):
            positions = range(start, min(start + _MOMENTS_AT_ONCE, len(self.ids)))
            total += moments.gather(positions, ["original"] * len(positions)).sum(axis=0, dtype=np.float64)
        mean, mean_square = total / (len(self.ids) * grid_rows * grid_columns)
        variance = np.maximum(mean_square - mean**2, 0.0)
        if self.manifest(teacher).pca is not None:
            variance = np.full_like(variance, variance.mean())
        return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)

    def record(self, arrays: Iterable[SelectedArray]) -> list[dict[str, Json]]:
        """Return what identifies the given arrays: every store's path and fingerprint, and what it serves of them.

        arrays: by path, `fingerprint`, `content` (the digest over the committed bytes), `sample_shape` and `dtype`.
        """
        served: list[dict[str, Json]] = [{} for _ in self.stores]
        for places in (places for array in arrays for places in array.places.values()):
            for number in sorted(set(places.reader.tolist())):
                reader, store = places.readers[number], places.stores[number]
                served[store][reader.layout.path] = {
                    "fingerprint": self.stores[store].catalog.fingerprints[reader.layout.path],
                    "content": reader.content_digest,
                    "sample_shape": list(reader.layout.sample_shape),
                    "dtype": reader.layout.dtype,
                }
        return [
            {"store": str(store.catalog.path), "fingerprint": store.catalog.fingerprint, "arrays": found}
            for store, found in zip(self.stores, served, strict=True)
        ]

    def _manifest(self, number: int, teacher: str, view: View) -> ViewManifest:
        return self.stores[number].catalog.teachers[teacher].views[view].manifest

    def _holding(self, teacher: str, view: View | None = None, name: str | None = None) -> list[int]:
        """Return the numbers of the stores that hold a teacher, or a view of it, or an array of that view."""
        teachers = {n: store.catalog.teachers.get(teacher) for n, store in enumerate(self.stores)}
        found = [n for n, stored in teachers.items() if stored is not None]
        if not found:
            raise StoreIncompleteError(
                f"no teacher {teacher!r} in {self.where} (found {', '.join(self.outputs) or 'none'})",
                hint=f"add it: python cli.py extract-teachers … --teacher {teacher}",
            )
        if view is None:
            return found
        holder = self.stores[found[0]].catalog
        views = {n: stored.views for n, stored in teachers.items() if stored is not None}
        found = [n for n in found if view in views[n]]
        if not found:
            held = ", ".join(dict.fromkeys(each for stored in views.values() for each in stored))
            raise StoreIncompleteError(
                f"teacher {teacher}: view {view!r} is not in {self.where} (found {held or 'none'})",
                hint=("train with --flip 0, or " if view == "hflip" else "") + adding_views(holder, teacher, [view]),
            )
        with_name = [n for n in found if name in views[n][view].layouts]
        if not with_name:
            held = ", ".join(dict.fromkeys(each for n in found for each in views[n][view].layouts))
            raise StoreIncompleteError(f"teacher {teacher}: no {name} in {self.where} (found {held})")
        return with_name

    def _places(self, teacher: str, view: View, name: str, holding: list[int]) -> ViewPlaces:
        reader = np.full(len(self.ids), -1, dtype=np.int16)
        row = np.full(len(self.ids), -1, dtype=np.int64)
        for place, number in enumerate(holding):
            served = (reader < 0) & (self._rows[number] >= 0)
            reader[served] = place
            row[served] = self._rows[number][served]
        if (reader < 0).any():
            self._refuse_missing(teacher, view, holding, np.flatnonzero(reader < 0))
        readers = tuple(self.stores[number].array(teacher, view, name) for number in holding)
        for place, each in enumerate(readers):
            positions = np.flatnonzero(reader == place)
            committed = each.committed[row[positions] // each.layout.shard_samples]
            if not committed.all():
                self._refuse_uncommitted(holding[place], each, positions[~committed])
        return ViewPlaces(tuple(holding), readers, reader, row)

    def _refuse_missing(self, teacher: str, view: View, holding: list[int], missing: NDArray[np.intp]) -> None:
        catalogs = [self.stores[number].catalog for number in holding]
        held = [
            f"{c.path if len(catalogs) > 1 else 'it'} holds {c.root.dataset.samples} images of"
            f" {'+'.join(c.root.dataset.sets)}"
            for c in catalogs
        ]
        of = f" of teacher {teacher}, view {view}" if len(self.stores) > 1 else ""
        raise StoreIncompleteError(
            f"{len(missing)} of {len(self.ids)} {self._called} are not in {self._named(holding)}{of}"
            f" ({self._shown(missing)}); {', '.join(held)}",
            hint="train on images that are there (--voc-set, --limit), or extract the others into a store of their own"
            " and give it too: python cli.py extract-teachers … --out OTHER, then --cached-teachers OTHER",
        )

    def _refuse_uncommitted(self, number: int, reader: ArrayReader, missing: NDArray[np.intp]) -> None:
        raise StoreIncompleteError(
            f"{self.stores[number].catalog.path}: {reader.layout.path}: {len(missing)} of {len(self.ids)}"
            f" {self._called} are not committed ({self._shown(missing)})",
            hint="run the same extract-teachers command again: it resumes",
        )

    def _shown(self, positions: NDArray[np.intp]) -> str:
        more = f", … {len(positions) - _MAX_SHOWN} more" if len(positions) > _MAX_SHOWN else ""
        return ", ".join(self.ids[position] for position in positions[:_MAX_SHOWN]) + more


def _refuse_images(store: TeacherStore) -> None:
    if is_image_store(store.catalog):
        path = store.catalog.path
        raise UsageError(
            f"{path}: an image store holds decoded images, no teacher's targets",
            hint=f"give it as --cache-images {path}, and a store that extract-teachers made as --cached-teachers",
        )
