"""`inspect-cache`: what a store holds, as JSON, as a table, and some samples of it as a picture. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache.catalog import Catalog, read_catalog
from cache.reader import TeacherStore, read_features
from cache.summary import summarise, summarise_unreadable
from cache.training_gaps import Gap
from cache.verify import find_problems, read_ledgers
from data.errors import StoreCorruptError, StoreIncompleteError, UsageError
from data.geometry import View, boxes_to_frame, cell_of_point
from data.records import VOC_CLASSES
from pipeline.inspection_tables import closing_lines, summary_table

if TYPE_CHECKING:
    from evaluation.heatmaps import HeatmapRow

__all__ = ["closing_lines", "heatmap", "inspect_store", "inspect_with_progress", "summary_table"]

# A picture of more rows is too tall to look at.
MAX_PICTURED = 24


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


def heatmap(
    store: Path,
    samples: str | Sequence[str],
    voc_root: Path | None,
    view: View = "original",
    *,
    teacher: str | None = None,
    cell: tuple[int, int] | None = None,
) -> bytes:
    """Return a PNG of the stored features of one sample or several, with their images where the devkit is given.

    samples: ids, one row each.  teacher: key of the teacher, by default the first that has features of the view.
    cell: (row, column) of its grid that the others are compared with. By default the one that holds the centre of the
    image's largest object; the grid's central one without objects or without the devkit. Of projected features it
    shows the components.

    Raises UsageError for an unknown id, teacher or cell, or too many ids, StoreIncompleteError where no teacher has
    features of the view.
    """
    from evaluation.heatmaps import heatmap_figure

    ids = list(dict.fromkeys([samples] if isinstance(samples, str) else samples))
    if not 1 <= len(ids) <= MAX_PICTURED:
        raise UsageError(f"expected 1 to {MAX_PICTURED} samples in a picture, found {len(ids)}")
    opened = TeacherStore(store)
    stored = {sample_id: _row(opened, sample_id) for sample_id in ids}
    key = _feature_teacher(opened.catalog, teacher, view)
    rows = []
    for sample_id, row in stored.items():
        features = read_features(opened, key, view, row)
        _check_cell(cell, features, key)
        rows.append(_pictured(sample_id, features, view, voc_root, cell))
    manifest = opened.catalog.teachers[key].manifest
    projected = "" if manifest.pca is None else f" · {rows[0].features.shape[-1]} principal components"
    untrained = " · untrained" if manifest.untrained else ""
    return heatmap_figure(rows, f"{key} · {view}{projected}{untrained}")


def _feature_teacher(catalog: Catalog, asked: str | None, view: View) -> str:
    """Return the key of the teacher to draw."""
    has_features = [
        key for key, t in catalog.teachers.items() if view in t.views and "features" in t.views[view].layouts
    ]
    if asked is not None and asked not in has_features:
        listed = ", ".join(has_features) or "none"
        raise UsageError(
            f"--teacher {asked}: {catalog.path} has no features of it in view {view!r} (teachers with them: {listed})"
        )
    if not has_features:
        raise StoreIncompleteError(f"{catalog.path}: no teacher has features of view {view!r}")
    return asked or has_features[0]


def _check_cell(cell: tuple[int, int] | None, features: NDArray[np.floating], key: str) -> None:
    height, width, _ = features.shape
    if cell is not None and not (0 <= cell[0] < height and 0 <= cell[1] < width):
        raise UsageError(
            f"--cell {cell[0]},{cell[1]}: expected a row 0 to {height - 1} and a column 0 to {width - 1} of the"
            f" {height}×{width} grid of {key}"
        )


def _pictured(
    sample_id: str, features: NDArray[np.floating], view: View, voc_root: Path | None, cell: tuple[int, int] | None
) -> HeatmapRow:
    """Return a sample's row of the picture; with the devkit, its image, and its largest object marked."""
    from evaluation.heatmaps import HeatmapRow

    if voc_root is None:
        return HeatmapRow(sample_id, features, cell=cell)

    from data.images import decode_image, show_view, squash
    from data.voc import read_record

    record = read_record(voc_root, sample_id)
    image = squash(show_view(decode_image(record), view))
    title = sample_id
    if cell is None and len(record.target):
        boxes = boxes_to_frame(record.target.boxes_xyxy_orig, record.image_size, view)
        largest = int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argmax())
        x1, y1, x2, y2 = boxes[largest].tolist()
        cell = cell_of_point((x1 + x2) / 2, (y1 + y2) / 2, features.shape[:2])
        title += f" · marked: centre of the largest object, {VOC_CLASSES[record.target.labels[largest] - 1]}"
    return HeatmapRow(title, features, image, cell)


def _row(opened: TeacherStore, sample_id: str) -> int:
    if sample_id not in opened.row_of_id:
        known = list(opened.row_of_id)
        raise UsageError(
            f"no sample {sample_id!r} in {opened.catalog.path}; it holds {known[0]} … {known[-1]} ({len(known)})"
        )
    return opened.row_of_id[sample_id]
