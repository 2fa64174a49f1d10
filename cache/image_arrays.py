"""Stores of images instead of targets: decoded once, squashed to the frame, read by training instead of the files.

A store holds one or the other. An image store has one pseudo-teacher with the array `images` of the view `original`;
`hflip` is the mirrored array, since a symmetric filter resizes a mirrored image to the mirrored resize.

Axes: H × W frame.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalog import Catalog, StoredTeacher
from cache.layout import IMAGES
from cache.plan import StorePlan
from cache.reader import ArrayReader
from data.errors import StoreCorruptError, StoreStaleError


def is_image_store(catalog: Catalog) -> bool:
    """Return whether a store holds images and nothing else."""
    return bool(catalog.teachers) and all(map(_has_images_only, catalog.teachers.values()))


def _has_images_only(teacher: StoredTeacher) -> bool:
    names = {name for view in teacher.views.values() for name in view.layouts}
    return names == {IMAGES}


def training_command(catalog: Catalog) -> str:
    """Return the command that makes an image store, finishes it and trains from it.

    Training and validation images are in one store, and it does not say which are which.
    """
    return f"python cli.py train … --cache-images {shlex.quote(str(catalog.path))}"


def removal_command(path: Path) -> str:
    """Return the command that removes an image store, which the next run makes again."""
    return shlex.join(["rm", "-r", str(path)])


def refuse_mixing(catalog: Catalog, plan: StorePlan) -> None:
    """Raise StoreStaleError where images would come into a store of targets, or targets into one of images."""
    asked = any(IMAGES in teacher.outputs for teacher in plan.teachers)
    stored = is_image_store(catalog)
    if catalog.teachers and asked != stored:
        kinds = {True: "decoded images", False: "teachers' targets"}
        raise StoreStaleError(
            f"{catalog.path}: expected a store of {kinds[asked]}, found one of {kinds[stored]}",
            hint="each kind has a store of its own: images that of --cache-images, targets that of extract-teachers"
            " --out and train --cached-teachers",
        )


class StoredImages:
    """The images of a run, read from a store through memory maps.

    Pickles without its digests; safe to use after a fork; not from two threads at once.

    path: of the store.  digests: SHA-256 of each image's file by id, as it was when it was decoded.
    """

    def __init__(self, path: Path, reader: ArrayReader, rows: Mapping[str, int], digests: Mapping[str, str]) -> None:
        """Read from a store at a path. reader: of its images.  rows: of the run's images, by id."""
        self.path = path
        self.digests = dict(digests)
        self._reader = reader
        self._rows = dict(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "digests": {}}

    def read(self, image_id: str) -> NDArray[np.uint8]:
        """Return an image, [H, W, 3] uint8 RGB: a read-only view into the map.

        Raises StoreCorruptError naming the image where its checksum fails.
        """
        try:
            frame: NDArray[np.uint8] = self._reader.read(self._rows[image_id])
        except StoreCorruptError as error:
            raise StoreCorruptError(
                f"{self.path}: {error.message} ({image_id})",
                hint=f"remove the store, the same command then makes it again: {removal_command(self.path)}",
            ) from error
        return frame
