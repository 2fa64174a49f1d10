"""`inspect-cache`: what a store holds, as JSON, as a table, and one sample of it as a picture. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalog import Catalog, read_catalog
from cache.reader import TeacherStore, read_features
from cache.summary import summarise, summarise_unreadable
from cache.training_gaps import Gap
from cache.verify import find_problems, read_ledgers
from data.errors import StoreCorruptError, StoreIncompleteError, UsageError
from data.geometry import View
from pipeline.inspection_tables import closing_lines, summary_table

__all__ = ["closing_lines", "heatmap", "inspect_store", "inspect_with_progress", "summary_table"]


def inspect_store(store: Path, *, verify: bool) -> dict[str, Any]:
    """Return the JSON of `inspect-cache`.

    Raises StoreMissingError or StoreStaleError (newer format); a corrupt store is a result, not an error.
    """
    return _inspect(store, verify, lambda _: [], quiet=True)


def inspect_with_progress(
    store: Path, *, verify: bool, voc_root: Path | None = None, voc_sets: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the JSON of `inspect-cache`, showing the progress of what takes long.

    voc_root, voc_sets: images to compare with those that the store was made from; without sets, all of those.

    Raises as `inspect_store`; UsageError or DatasetError for image sets that cannot be read.
    """

    def image_gaps(catalog: Catalog) -> list[Gap]:
        if voc_root is None:
            return []
        # Needs Pillow, which a look at the store alone does not.
        from pipeline.inspection_images import find_image_gaps

        return find_image_gaps(catalog, voc_root, voc_sets, digests=verify)

    return _inspect(store, verify, image_gaps, quiet=False)


def _inspect(store: Path, verify: bool, image_gaps: Callable[[Catalog], list[Gap]], *, quiet: bool) -> dict[str, Any]:
    try:
        catalog = read_catalog(store)
    except StoreCorruptError as error:
        return summarise_unreadable(store, error)
    ledgers = read_ledgers(catalog)
    total = sum(entry.num_bytes for ledger in ledgers.values() for entry in ledger.entries.values())
    with _silence() if quiet or not verify else _bar(total) as advance:
        problems = find_problems(catalog, verify=verify, ledgers=ledgers, progress=advance)
    return summarise(catalog, problems, verified=verify, ledgers=ledgers, gaps=image_gaps(catalog))


@contextmanager
def _silence() -> Iterator[Callable[[int], None]]:
    yield lambda _: None


@contextmanager
def _bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    # Here, since a look without --verify is over before this is imported.
    from pipeline.byte_progress import megabytes

    with megabytes("verifying", total_bytes) as advance:
        yield advance


def heatmap(store: Path, sample_id: str, voc_root: Path | None, view: View = "original") -> bytes:
    """Return a PNG of one sample's stored features, with its image where the devkit is given.

    Of projected features it shows the components.

    Raises UsageError for an unknown id, StoreIncompleteError where no teacher has features of it.
    """
    from data.images import decode_image, show_view, squash
    from data.voc import read_record
    from evaluation.heatmaps import heatmap_figure

    opened = TeacherStore(store)
    row = _row(opened, sample_id)
    with_features = [
        key for key, t in opened.catalog.teachers.items() if view in t.views and "features" in t.views[view].layouts
    ]
    if not with_features:
        raise StoreIncompleteError(f"{store}: no teacher has features of view {view!r}")
    key = with_features[0]
    teacher = opened.catalog.teachers[key]
    features = read_features(opened, key, view, row)
    image: NDArray[np.uint8] | None = None
    if voc_root is not None:
        image = squash(show_view(decode_image(read_record(voc_root, sample_id)), view))
    projected = "" if teacher.manifest.pca is None else f" · {features.shape[-1]} principal components"
    title = f"{sample_id} · {key} · {view}{projected}"
    untrained = teacher.manifest.untrained
    return heatmap_figure(features, title, image=image, untrained=untrained)


def _row(opened: TeacherStore, sample_id: str) -> int:
    if sample_id not in opened.row_of_id:
        known = list(opened.row_of_id)
        raise UsageError(
            f"no sample {sample_id!r} in {opened.catalog.path}; it holds {known[0]} … {known[-1]} ({len(known)})"
        )
    return opened.row_of_id[sample_id]
