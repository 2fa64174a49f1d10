"""Whether a devkit's images are those that the teachers of a store saw. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from cache.catalog import Catalog
from cache.image_arrays import is_image_store
from cache.samples import SampleEntry
from cache.training_gaps import Gap, listed
from data.errors import StoreError
from data.voc import image_path, list_ids
from pipeline.progress import progress

_THREADS = 8


def find_image_gaps(catalog: Catalog, voc_root: Path, sets: Sequence[str], *, digests: bool) -> list[Gap]:
    """Return what training on the images of a devkit would miss: ids the store lacks, files that are other images now.

    sets: image sets; none for those that the store was made of.  digests: compare the SHA-256 of every file; without
    it, the image's size in its header.

    Raises UsageError or DatasetError for image sets that cannot be read.
    """
    dataset = catalog.root.dataset
    ids = list_ids(voc_root, sets) if sets else list_ids(voc_root, dataset.sets)[: dataset.limit]
    try:
        stored = {sample.id: sample for sample in catalog.samples}
    except StoreError:
        return []  # `find_problems` says what is wrong with them
    named = " + ".join(sets or dataset.sets)
    gaps = []
    lacking = [image_id for image_id in ids if image_id not in stored]
    # An image store is made by training, and made anew where it is removed.
    made_again = (
        "give another store (--cache-images)" if is_image_store(catalog) else "extract a store of these (--out)"
    )
    if lacking:
        problem = f"{len(lacking):,} of {len(ids):,} images of {named} are not in the store ({listed(lacking)})"
        gaps.append(Gap(None, problem, f"train on images that the store holds, or {made_again}"))
    known = [stored[image_id] for image_id in ids if image_id in stored]
    changed = _changed(voc_root, known, digests)
    if changed:
        seen = "was decoded" if is_image_store(catalog) else "the teachers saw"
        problem = f"{len(changed):,} of {len(known):,} image files are not what {seen} ({listed(changed)})"
        gaps.append(Gap(None, problem, f"restore them from the devkit, or {made_again}"))
    return gaps


def _changed(voc_root: Path, samples: Sequence[SampleEntry], digests: bool) -> list[str]:
    """Return the ids whose file is another image now, each with what is different."""

    def difference(sample: SampleEntry) -> str | None:
        path = image_path(voc_root, sample.id)
        try:
            return _other_digest(path, sample) if digests else _other_size(path, sample)
        except FileNotFoundError:
            return "missing"
        except (OSError, Image.DecompressionBombError):  # what is no image is an OSError, too
            return "unreadable"

    changed = []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with progress("comparing images", max(1, len(samples))) as tick:
            for sample, what in zip(samples, pool.map(difference, samples), strict=True):
                tick()
                if what is not None:
                    changed.append(f"{sample.id}: {what}")
    finally:
        pool.shutdown(cancel_futures=True)
    return changed


def _other_digest(path: Path, sample: SampleEntry) -> str | None:
    return None if hashlib.sha256(path.read_bytes()).hexdigest() == sample.sha256 else "other bytes"


def _other_size(path: Path, sample: SampleEntry) -> str | None:
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        width, height = image.size
    if (height, width) == (sample.height, sample.width):
        return None
    return f"{width}×{height} instead of {sample.width}×{sample.height}"
