"""Plans a derived store: which parts of a source it takes over, which arrays change, what may not be asked.

An array whose bytes stay keeps its identity. One whose values are computed anew carries the fingerprint of the features
it was computed from, and the PCA basis where there is one: no other basis gives the same components.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache.catalog import Catalog, StoredTeacher, read_catalog
from cache.image_arrays import is_image_store, training_command
from cache.layout import OF_FEATURES, PCA, TEXT_EMBEDDINGS
from cache.manifest import StoredArray, StoredDtype
from cache.open_storage import find_storage
from cache.plan import Derivation, StoreFormat, StorePlan, TeacherPlan, format_of
from cache.reader import read_constant
from cache.source import Basis, BasisRequest, ViewReader, fit_basis, reading, stored_basis
from data.errors import StoreCorruptError, StoreIncompleteError, StoreWriteError, UsageError
from data.geometry import VIEWS, View

_MAX_SHOWN = 8

Tick = Callable[[int], None]
# Told what is being done, how many units of it there are and what they are called.
ShowProgress = Callable[[str, int, str], AbstractContextManager[Tick]]


@contextmanager
def silently(_what: str, _total: int, _unit: str) -> Iterator[Tick]:
    """Show no progress."""
    yield lambda _: None


@dataclass(frozen=True)
class ConvertRequest:
    """What `convert-cache` was asked for.

    teachers, views: those to take over, empty for all.  dtype: of stored features, None for the source's own.
    components: of the PCA, None for none.  fit_ids: the samples to fit it on, None for all.  format: None for what the
    path's suffix says.  shard_samples: None for the source's own.  command: what asks for the same again, provenance.
    """

    source: Path
    out: Path
    command: str
    teachers: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    dtype: StoredDtype | None = None
    components: int | None = None
    fit_ids: Collection[str] | None = None
    format: StoreFormat | None = None
    shard_samples: int | None = None
    repair: bool = False


@dataclass(frozen=True, eq=False)
class DerivedTeacher:
    """One teacher of the source and what becomes of it.

    dtype: of its features in the derived store, None for a teacher without.  components: of the PCA, None for none.
    basis: what they are projected on, once it is known.
    """

    stored: StoredTeacher
    views: tuple[View, ...]
    dtype: StoredDtype | None = None
    components: int | None = None
    basis: Basis | None = None

    @property
    def key(self) -> str:
        """Its key in both stores."""
        return self.stored.manifest.key

    @property
    def features(self) -> StoredArray | None:
        """Its features in the source: alike in every view but for their fingerprint."""
        return self.stored.views[self.views[0]].manifest.arrays.get("features")

    def copies(self, name: str) -> bool:
        """Return whether the bytes of an array stay as they are."""
        if self.features is None or name not in {*OF_FEATURES, "features"}:
            return True
        return self.components is None and self.dtype == self.features.dtype

    def plan(self, catalog: Catalog, views: Sequence[View], batch_size: int) -> TeacherPlan:
        """Return the teacher as the derived store sees it; its constants are read from the source."""
        manifest = self.stored.manifest
        constants = {name: read_constant(catalog.storage, self.stored, name) for name in self.stored.constants}
        # In the order of the source's manifest: a copy's manifests are then the same bytes.
        arrays = self.stored.views[views[0]].manifest.arrays
        outputs = {name: array.sample_shape for name, array in arrays.items() if name not in OF_FEATURES}
        if self.components is not None:
            outputs["features"] = (*outputs["features"][:2], self.components)
        plan = TeacherPlan(
            key=self.key,
            identity=manifest.identity,
            untrained=manifest.untrained,
            probe=manifest.probe.values,
            outputs=outputs,
            text_embeddings=constants.get(TEXT_EMBEDDINGS),
            feature_dtype=self.dtype,
            batch_size=batch_size,
        )
        names = plan.array_shapes(self.dtype or "float32")
        derivation = Derivation(
            sources={view: self._sources(view, names) for view in views},
            pca=manifest.pca if self.basis is None else self.basis.manifest,
            basis=constants.get(PCA) if self.basis is None else self.basis.values,
        )
        return dataclasses.replace(plan, derivation=derivation)

    def _sources(self, view: View, names: Collection[str]) -> dict[str, str]:
        arrays = self.stored.views[view].manifest.arrays
        # A copy says of itself what its original says, which may be derived too.
        found = {n: arrays[n].source if self.copies(n) else arrays["features"].fingerprint for n in names}
        return {name: source for name, source in found.items() if source is not None}


def select(catalog: Catalog, request: ConvertRequest) -> list[DerivedTeacher]:
    """Return the teachers that were asked for, and what becomes of each.

    Raises UsageError, listing what there is, for a teacher or a view that the source lacks; for a PCA that cannot be.
    """
    path = catalog.path
    if is_image_store(catalog):
        raise UsageError(
            f"{path}: an image store holds decoded images, not targets: there is nothing to convert",
            hint=f"make one of other images or in another container: {training_command(catalog)}",
        )
    for key in request.teachers:
        if key not in catalog.teachers:
            raise UsageError(f"{path}: no teacher {key!r} in this store (it has {', '.join(catalog.teachers)})")
    keys = list(dict.fromkeys(request.teachers or catalog.teachers))
    if not keys:
        raise UsageError(f"{path}: there is no teacher in this store, so nothing to convert")
    derived = [_derived(catalog, catalog.teachers[key], request) for key in keys]
    if request.components is not None and all(teacher.features is None for teacher in derived):
        having = [key for key, stored in catalog.teachers.items() if _has_features(stored)]
        raise UsageError(
            f"--pca: no features of {', '.join(keys)} in {path} (teachers with features: {', '.join(having) or 'none'})"
        )
    return derived


def _has_features(stored: StoredTeacher) -> bool:
    return any("features" in view.layouts for view in stored.views.values())


def _derived(catalog: Catalog, stored: StoredTeacher, request: ConvertRequest) -> DerivedTeacher:
    wanted = request.views or tuple(stored.views)
    for view in wanted or VIEWS:
        if view not in stored.views:
            has = ", ".join(stored.views) or "none"
            raise UsageError(
                f"{catalog.path}: no view {view!r} of teacher {stored.manifest.key} in this store (it has {has})"
            )
    views = tuple(view for view in VIEWS if view in wanted)
    teacher = DerivedTeacher(stored, views)
    if teacher.features is None:
        return teacher
    if request.components is not None:
        _check_components(catalog, teacher, teacher.features.sample_shape[-1], request.components)
    dtype = request.dtype or teacher.features.dtype
    assert dtype != "uint8", "manifests allow that for images alone"
    return DerivedTeacher(stored, views, dtype, request.components)


def _check_components(catalog: Catalog, teacher: DerivedTeacher, channels: int, components: int) -> None:
    if teacher.stored.manifest.pca is not None:
        raise UsageError(
            f"--pca: the features of {teacher.key} in {catalog.path} are components of a PCA already",
            hint="convert the store that they were made from",
        )
    if not 1 <= components <= channels:
        raise UsageError(f"--pca: expected 1 to {channels} components of {teacher.key}, found {components}")


def check_destination(source: Path, out: Path) -> None:
    """Raise UsageError where one store would lie in the other, StoreWriteError where something else is at `out`."""
    if out.resolve() == source.resolve():
        raise UsageError(f"{out}: a store cannot be converted into itself", hint="give another DST")
    if source.resolve() in out.resolve().parents or out.resolve() in source.resolve().parents:
        raise UsageError(f"{out} and {source}: one lies inside the other", hint="give a DST beside the source")
    # Before a long fit: whoever creates the store would refuse it only then.
    if find_storage(out) is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreWriteError(f"{out}: something that is not a store is already there", hint="give another DST")


def refuse_incomplete(catalog: Catalog, teachers: Sequence[DerivedTeacher], fit: Sequence[int], finish: str) -> None:
    """Raise StoreIncompleteError, naming each array that lacks samples, unless all that is read is committed.

    fit: rows of the `original` view that a PCA is fitted on.  finish: the command that writes what is missing.
    """
    lacking: dict[str, int] = {}
    for teacher in teachers:
        for view in teacher.views:
            for array in ViewReader(catalog, teacher.key, view).arrays.values():
                lacking[array.layout.path] = array.num_missing
        if teacher.components is not None and "original" not in teacher.views:
            for array in ViewReader(catalog, teacher.key, "original").arrays.values():
                lacking[array.layout.path] = len(array.missing_rows(fit))
    shown = [f"  {path}: {count} of {len(catalog.samples)} missing" for path, count in lacking.items() if count]
    if not shown:
        return
    if len(shown) > _MAX_SHOWN:
        shown[_MAX_SHOWN:] = [f"  … and {len(shown) - _MAX_SHOWN} more arrays"]
    raise StoreIncompleteError(
        "\n".join([f"{catalog.path}: samples that are to be converted are not committed:", *shown]),
        hint=f"finish this store first, it resumes: {finish}",
    )


def with_basis(
    catalog: Catalog, teacher: DerivedTeacher, request: ConvertRequest, fit: Sequence[int], show: ShowProgress
) -> DerivedTeacher:
    """Return the teacher with the basis that it is projected on, if it is: the derived store's own where it has one.

    Two fits agree to the last bit only on one machine with one number of threads. What is committed was projected on
    the stored basis, so what is still missing must be, too.

    Raises StoreStaleError where the stored basis is that of another PCA, else as `fit_basis`.
    """
    if teacher.components is None or teacher.features is None:
        return teacher
    asked = BasisRequest(catalog, teacher.key, (1 + teacher.components, teacher.features.sample_shape[-1]), fit)
    basis = _kept_basis(asked, request)
    if basis is None:
        with show(f"fitting the PCA of {teacher.key}", len(fit), "images") as tick:
            basis = fit_basis(asked, tick)
    return dataclasses.replace(teacher, basis=basis)


def _kept_basis(asked: BasisRequest, request: ConvertRequest) -> Basis | None:
    try:
        return None if find_storage(request.out) is None else stored_basis(read_catalog(request.out), asked)
    except StoreCorruptError:
        if not request.repair:
            raise
        return None  # what a new fit gives is proven to be the lost one, or refused, when the store is mended


def store_plans(catalog: Catalog, teachers: Sequence[DerivedTeacher], request: ConvertRequest) -> list[StorePlan]:
    """Return what a writer is to be asked for: one plan for all that has the same views, cut alike; mostly one.

    Raises UsageError where that is more than one, and the container takes nothing more once it is made.
    """
    groups: dict[tuple[tuple[View, ...], int], list[TeacherPlan]] = defaultdict(list)
    for teacher in teachers:
        cuts: dict[tuple[int, int], list[View]] = defaultdict(list)
        for view in teacher.views:
            layout = teacher.stored.views[view].manifest.layout
            cuts[request.shard_samples or layout.shard_samples, layout.batch_size].append(view)
        for (shard_samples, batch_size), views in cuts.items():
            with reading(catalog):
                groups[tuple(views), shard_samples].append(teacher.plan(catalog, views, batch_size))
    container = request.format or format_of(request.out)
    if container == "hdf5" and len(groups) > 1:
        raise UsageError(_unlike(catalog, groups), hint="choose with --teacher and --view, or make a Zarr store")
    return [
        StorePlan(
            sets=catalog.root.dataset.sets,
            limit=catalog.root.dataset.limit,
            samples=catalog.samples,
            teachers=plans,
            views=views,
            feature_dtype="float32",  # of none: each teacher with features brings their dtype
            shard_samples=shard_samples,
            batch_size=None,
            frame=catalog.root.frame,
            format=request.format,
        )
        for (views, shard_samples), plans in groups.items()
    ]


def _unlike(catalog: Catalog, groups: Mapping[tuple[tuple[View, ...], int], Sequence[TeacherPlan]]) -> str:
    shown = [
        f"  {plan.key}: {', '.join(views)}, shards of {shard_samples} samples, batches of {plan.batch_size}"
        for (views, shard_samples), plans in groups.items()
        for plan in plans
    ]
    return "\n".join(
        [f"{catalog.path}: an HDF5 store is made in one go, of teachers with the same views, cut alike; found:", *shown]
    )
