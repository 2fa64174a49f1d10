"""Reads Pascal VOC devkits: image sets, and the records of their images.

An image set is named `YEAR:SPLIT` (`2007:trainval` is `VOC2007/ImageSets/Main/trainval.txt`). Ids are made unique over
joined devkits as `VOC2007/000005`. Devkits are untrusted input: an id that is a path is refused, and no file outside
the devkit's own folders is ever opened.

Source: the VOC2007 development kit documentation, sections 3 to 5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .annotation import (
    AnnotatedObject,
    object_elements,
    parse_annotation,
    read_filename,
    read_object,
    read_size,
)
from .errors import DatasetError, UsageError
from .records import VOC_CLASSES, ImageRecord, Target

_SET_SPEC = re.compile(r"(?P<year>[0-9]{4}):(?P<split>[A-Za-z0-9_\-]+)")
_IMAGE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-.]*")


def read_voc(voc_root: Path, sets: Sequence[str], limit: int | None = None) -> list[ImageRecord]:
    """Return the records of the given image sets, in file order, sets joined, a repeated id kept once.

    voc_root: the folder that holds `VOC2007`.  limit: keep the first N.  Images are not opened.

    Raises UsageError for a malformed set name or limit, DatasetError for a missing or empty set, AnnotationError for
    bad XML.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"expected a limit of at least one image, found {limit}")
    return [read_record(voc_root, image_id) for image_id in list_ids(voc_root, sets)[:limit]]


def list_ids(voc_root: Path, sets: Sequence[str]) -> list[str]:
    """Return the unique ids (`VOC2007/000005`) of the joined image sets, in file order.

    Raises UsageError for a malformed set name, DatasetError for a missing, empty or malformed list.
    """
    if not sets:
        raise UsageError("no image set was named", hint="give one, as in --voc-set 2007:train")
    return list(dict.fromkeys(image_id for spec in sets for image_id in ids_of_set(voc_root, spec)))


def ids_of_set(voc_root: Path, spec: str) -> list[str]:
    """Return the ids of one image set as its file lists them, repeated ones too.

    Raises UsageError for a malformed set name, DatasetError for a missing, empty or malformed list.
    """
    path = set_path(voc_root, spec)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise _missing_set(voc_root, path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text ({error})") from error
    stems = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not stems:
        raise DatasetError(
            f"{path}: expected image ids, one a line, found an empty image set",
            hint="choose another set with --voc-set, or restore this file from the devkit",
        )
    for number, stem in stems.items():
        if not _IMAGE_ID.fullmatch(stem):
            raise DatasetError(f"{path}: expected an image id such as 000005 in line {number}, found {stem!r}")
    devkit = path.parents[2].name
    return [f"{devkit}/{stem}" for stem in stems.values()]


def set_path(voc_root: Path, spec: str) -> Path:
    """Return the file that lists an image set named `YEAR:SPLIT`; it need not exist.

    Raises UsageError for a malformed name.
    """
    match = _SET_SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(
            f"expected an image set as YEAR:SPLIT, found {spec!r}",
            hint="write it as in --voc-set 2007:trainval",
        )
    return voc_root / f"VOC{match['year']}" / "ImageSets" / "Main" / f"{match['split']}.txt"


def read_record(voc_root: Path, image_id: str) -> ImageRecord:
    """Return the record of one image, `VOC2007/000005`, from its annotation alone.

    Raises AnnotationError with the file's name for anything the annotation gets wrong.
    """
    path = annotation_path(voc_root, image_id)
    root = parse_annotation(path)
    read_filename(root, path)
    size = read_size(root, path)
    objects = [
        read_object(element, number, size, path) for number, element in enumerate(object_elements(root), start=1)
    ]
    return ImageRecord(image_id, image_path(voc_root, image_id), path, size, _target(objects))


def annotation_path(voc_root: Path, image_id: str) -> Path:
    """Return where the annotation of the image `VOC2007/000005` is."""
    devkit, stem = image_id.split("/")
    return voc_root / devkit / "Annotations" / f"{stem}.xml"


def image_path(voc_root: Path, image_id: str) -> Path:
    """Return where the file of the image `VOC2007/000005` is."""
    devkit, stem = image_id.split("/")
    return voc_root / devkit / "JPEGImages" / f"{stem}.jpg"


def _target(objects: Sequence[AnnotatedObject]) -> Target:
    boxes = np.array([found.box_xyxy for found in objects], dtype=np.float32)
    return Target(
        boxes_xyxy_orig=boxes.reshape(-1, 4),  # an image without objects has boxes [0, 4]
        labels=np.array([found.label for found in objects], dtype=np.int64),
        difficult=np.array([found.difficult for found in objects], dtype=np.bool_),
    )


def _missing_set(voc_root: Path, path: Path) -> DatasetError:
    devkit = path.parents[2]
    if not devkit.is_dir():
        found = sorted(entry.name for entry in voc_root.glob("VOC[0-9]*")) if voc_root.is_dir() else []
        what = f"found {', '.join(found)}" if found else "found no VOC folder there"
        return DatasetError(
            f"{devkit}: no such devkit ({what})",
            hint="point --voc-root at the folder that holds VOC2007, run `python cli.py download-voc`,\n"
            "        or make a synthetic devkit with `python cli.py make-synthetic-voc DIR`",
        )
    lists = sorted(entry.stem for entry in path.parent.glob("*.txt"))
    # Per-class lists, `cat_train` beside `train`, would drown the names a user can mean. (`train` is a class, too.)
    per_class = {f"{name}_{split}" for name in VOC_CLASSES for split in lists}
    splits = [name for name in lists if name not in per_class]
    year = devkit.name.removeprefix("VOC")
    names = ", ".join(f"{year}:{split}" for split in splits) or "no image set at all"
    return DatasetError(f"{path}: no such image set; this devkit has {names}", hint="choose one with --voc-set")
