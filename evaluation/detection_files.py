"""Reads and writes detections in either format: a folder of the devkit's files, or a JSON file of COCO's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.errors import DetectionsError
from data.records import ImageRecord

from .coco_files import read_coco, write_coco
from .detections import Detections
from .devkit_files import read_devkit, write_devkit


def read_detections(path: Path, records: Sequence[ImageRecord]) -> tuple[Detections, list[str]]:
    """Return the detections of the records' images, and notes on what looks odd, a line each.

    path: a folder of `<prefix>_<class>.txt` files, or a file that ends in `.json`.

    Raises DetectionsError, naming file and line or entry, for anything that cannot be scored.
    """
    if path.suffix.lower() == ".json" and not path.is_dir():
        if not path.exists():
            raise DetectionsError(f"{path}: no such file of detections", hint=_EXPECTED)
        return read_coco(path, records)
    if path.is_file():
        raise DetectionsError(f"{path}: expected a folder or a .json file of detections", hint=_EXPECTED)
    return read_devkit(path, records)


def write_detections(detections: Detections, path: Path) -> None:
    """Write detections: COCO's results where the path ends in `.json`, else a folder of the devkit's files.

    Raises DetectionsError where they cannot be written.
    """
    if path.suffix.lower() == ".json":
        write_coco(detections, path)
    else:
        write_devkit(detections, path)


_EXPECTED = (
    "point --detections at a folder of `<prefix>_<class>.txt` files or at COCO's results in a .json file;"
    " `eval --save-detections` writes both"
)
