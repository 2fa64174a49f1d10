"""Detections as COCO's results: one JSON list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`.

Categories are 1 to 20, VOC's classes in the devkit's order; boxes are 0-based, so x and y are those of `Detections`. An
image is named by a string, `VOC2007/000005` or `000005`, or by the number that its stem is: 5, or 2008000001 for
`2008_000001`. Other keys of an entry are left alone.

Source: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import NUM_CLASSES, VOC_CLASSES, ImageRecord

from .decimals import shortest
from .detections import Detections
from .file_rows import FileRows, scorable
from .written_ids import WrittenIds, numbered_ids

_KEYS = ("image_id", "category_id", "bbox", "score")
_EXAMPLE = '[{"image_id": 5, "category_id": 8, "bbox": [x, y, width, height], "score": 0.9}, …]'


def write_coco(detections: Detections, path: Path) -> None:
    """Write detections as COCO's results; reading them back gives every float32 of the boxes again.

    Images are numbers where each has one of its own, else full ids. The file appears whole or not at all.

    Raises DetectionsError where it cannot be written.
    """
    path = path.absolute()
    if path.is_dir():
        raise DetectionsError(f"{path}: expected a file to write detections to, found a folder")
    ids = [json.dumps(image_id) for image_id in numbered_ids(detections.image_ids)]
    x1, y1, x2, y2 = detections.boxes_xyxy_orig.T
    x, y = shortest(x1), shortest(y1)
    numbers = [x, y, shortest(x2, -x), shortest(y2, -y), shortest(detections.scores)]
    columns = [map(repr, column.tolist()) for column in numbers]
    images = [ids[index] for index in detections.image_index.tolist()]
    # A line each, so that a line of the file is an entry.
    entries = (
        f'{{"image_id": {image}, "category_id": {label}, "bbox": [{x}, {y}, {width}, {height}], "score": {score}}}'
        for image, label, x, y, width, height, score in zip(images, detections.labels.tolist(), *columns, strict=True)
    )
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text("[" + ",\n".join(entries) + "]\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise DetectionsError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        fresh.unlink(missing_ok=True)


def read_coco(path: Path, records: Sequence[ImageRecord]) -> tuple[Detections, list[str]]:
    """Return the detections of a file of COCO's results, in its order, and notes, a line each.

    records: the images to score.

    Raises DetectionsError, naming file and entry, counted from 1, for anything in it that cannot be scored.
    """
    with _without_garbage_collection():
        entries = _read_list(path)
        images, labels, boxes, scores = _columns(path, entries)
        del entries

    def where(row: int) -> str:
        return f"{path}: entry {row + 1}"

    ids = WrittenIds([record.id for record in records])
    places = ids.places(images)
    if None in places:
        row = places.index(None)
        raise ids.refusal(where(row), row, images)
    with np.errstate(over="ignore", invalid="ignore"):  # told as a box that is not finite
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32)
    rows = FileRows(
        image_index=np.array(places, dtype=np.int64),
        labels=labels,
        scores=scores,
        boxes_xyxy_orig=corners,
        where=where,
        box_text=lambda row: json.dumps(boxes[row].tolist()),
    )
    return scorable(rows, records, ordered="width ≥ 0 and height ≥ 0 in [x, y, width, height]")


def _read_list(path: Path) -> list[Any]:
    try:
        data = path.read_bytes()
        entries = json.loads(data) if data.strip() else None
    except OSError as error:
        raise DetectionsError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise DetectionsError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise DetectionsError(f"{path}: not JSON (byte {error.start} is no UTF-8)") from error
    except RecursionError as error:
        raise DetectionsError(f"{path}: not a list of detections (nested too deeply)") from error
    if entries is None:
        raise DetectionsError(
            f"{path}: expected a list of detections, found an empty file",
            hint="where nothing was found, the list is empty: []",
        )
    if not isinstance(entries, list):
        found = "an object" if isinstance(entries, dict) else repr(entries)[:40]
        if isinstance(entries, dict) and "annotations" in entries:
            found = "COCO's ground truth"
        raise DetectionsError(f"{path}: expected a list of detections, found {found}", hint=f"as in {_EXAMPLE}")
    return entries


def _columns(
    path: Path, entries: list[Any]
) -> tuple[list[int | str], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return image ids [n], labels [n], boxes x, y, width, height [n, 4] and scores [n]."""
    try:
        # All at once, since a test set has half a million; the culprit is looked for only when there is one.
        images, labels, boxes, scores = (list(map(itemgetter(key), entries)) for key in _KEYS)
        coordinates = list(chain.from_iterable(boxes))
        sound = (
            set(map(type, images)) <= {int, str}
            and set(map(type, labels)) <= {int}
            and set(labels) <= set(range(1, NUM_CLASSES))
            and set(map(type, boxes)) <= {list}
            and set(map(len, boxes)) <= {4}
            and set(map(type, chain(coordinates, scores))) <= {int, float}
        )
        if sound:
            box_array = np.array(coordinates, dtype=np.float64).reshape(-1, 4)
            return images, np.array(labels, dtype=np.int64), box_array, np.array(scores, dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    for row, entry in enumerate(entries, start=1):
        problem = _problem(entry)
        if problem is not None:
            raise DetectionsError(f"{path}: entry {row}: {problem}", hint=f"as in {_EXAMPLE}")
    raise AssertionError(f"{path}: refused as a whole, yet no entry is wrong")


def _problem(entry: Any) -> str | None:
    """Return why one entry cannot be read, or None."""
    if not isinstance(entry, dict):
        return f"expected an object, found {_shown(entry)}"
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        return f"expected the keys {', '.join(_KEYS)}; found no {missing[0]}"
    image, label, box, score = (entry[key] for key in _KEYS)
    if type(image) not in (int, str):
        return f"expected image_id to be a string or a whole number, found {_shown(image)}"
    if type(label) is not int or not 1 <= label < NUM_CLASSES:
        return (
            f"expected category_id to be a whole number from 1 ({VOC_CLASSES[0]}) to {len(VOC_CLASSES)}"
            f" ({VOC_CLASSES[-1]}), VOC's classes in the devkit's order; found {_shown(label)}"
        )
    if type(box) is not list or len(box) != 4 or not all(map(_is_number, box)):
        return f"expected bbox to be four numbers [x, y, width, height], found {_shown(box)}"
    return None if _is_number(score) else f"expected score to be a number, found {_shown(score)}"


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and isinstance(float(value), float)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Half a million fresh dictionaries, none of them garbage: looking through them over and over doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
