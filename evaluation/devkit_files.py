"""The devkit's own files of detections.

A folder holds one text file a class, `<prefix>_<class>.txt`, with a line `image_id score xmin ymin xmax ymax` for each
detection; boxes are 1-based and inclusive there, 0-based and half-open in `Detections` (x1 = xmin − 1, x2 = xmax).

Source: the VOC2007 development kit documentation, detection task, results file format.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import LABEL_OF_CLASS, VOC_CLASSES

from .detections import Detections

_COLUMNS = "image_id score xmin ymin xmax ymax"
_CLASS_FILE = re.compile(r"(?P<prefix>.+)_(?P<name>[a-z]+)\.txt")


def write_devkit(detections: Detections, folder: Path, prefix: str = "comp4_det_test") -> None:
    """Write the devkit's twenty files, empty ones too; reading them back gives every float32 again.

    Ids are bare (`000005`) where all images are of one devkit, else full (`VOC2007/000005`). A coordinate less than
    2⁻²⁹ px from zero is written as zero. The folder appears whole or not at all; one that holds such files already is
    replaced.

    Raises DetectionsError where the folder holds anything else, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise DetectionsError(f"{folder}: expected a folder to write detections to, found a file")
    names = {f"{prefix}_{name}.txt" for name in VOC_CLASSES}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in names) if folder.exists() else []
    if foreign:
        raise DetectionsError(
            f"{folder}: expected an empty or new folder to write detections to, found {foreign[0]!r} in it",
            hint="choose another folder with --save-detections",
        )
    fresh, stale = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        fresh.mkdir(parents=True)
        for name, text in _class_texts(detections).items():
            (fresh / f"{prefix}_{name}.txt").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise DetectionsError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _class_texts(detections: Detections) -> dict[str, str]:
    ids = detections.image_ids
    one_devkit = len({_devkit(image_id) for image_id in ids}) <= 1
    shown = [_stem(image_id) for image_id in ids] if one_devkit else list(ids)
    shifts = (0.0, 1.0, 1.0, 0.0, 0.0)  # score, xmin = x1 + 1, ymin = y1 + 1, xmax = x2, ymax = y2
    texts = {}
    for name, label in LABEL_OF_CLASS.items():
        rows = np.flatnonzero(detections.labels == label)
        numbers = np.column_stack([detections.scores[rows], detections.boxes_xyxy_orig[rows]])
        columns = [_shortest(numbers[:, k], shift) for k, shift in enumerate(shifts)]
        images = [shown[index] for index in detections.image_index[rows].tolist()]
        texts[name] = "".join(f"{' '.join(row)}\n" for row in zip(images, *columns, strict=True))
    return texts


def _shortest(values: NDArray[np.float32], shift: float) -> list[str]:
    """Return value + shift with the fewest decimals from which float32(text − shift) is the value again."""
    exact = values.astype(np.float64) + shift
    written = exact.copy()
    pending = np.arange(len(values))
    for decimals in range(16):
        rounded = np.round(exact[pending], decimals)
        enough = (rounded - shift).astype(np.float32) == values[pending]
        written[pending[enough]] = rounded[enough]
        pending = pending[~enough]
    return [repr(number) for number in written.tolist()]


def read_devkit(folder: Path, image_ids: Sequence[str]) -> Detections:
    """Return the detections that a folder of devkit files holds, by class and falling score.

    image_ids: the images to score, as `VOC2007/000005`; the files may name them so or bare, `000005`, where that
    fits one image only.  A class without a file has no detections (`find_class_files` tells which have one).

    Raises DetectionsError, naming file and line, for anything in it that cannot be scored.
    """
    index_of = _index_by_written_id(image_ids)
    files = find_class_files(folder)
    parts = [_read_class_file(path, index_of) for path in files.values()]
    # Ranked before the scores become float32, so that scores which only differ as doubles keep their order.
    orders = [np.argsort(-numbers[0], kind="stable") for _, numbers in parts]
    numbers = np.concatenate([numbers[:, order] for (_, numbers), order in zip(parts, orders, strict=True)], axis=1)
    return Detections(
        image_ids=tuple(image_ids),
        image_index=np.concatenate([index[order] for (index, _), order in zip(parts, orders, strict=True)]),
        labels=np.repeat([LABEL_OF_CLASS[name] for name in files], [len(order) for order in orders]),
        scores=numbers[0].astype(np.float32),
        boxes_xyxy_orig=(numbers[1:].T - np.array([1.0, 1.0, 0.0, 0.0])).astype(np.float32),
    )


def find_class_files(folder: Path) -> dict[str, Path]:
    """Return the folder's detection files by class name, in the devkit's order.

    Raises DetectionsError for a missing folder, one without such a file, with two prefixes, or with a file of that
    prefix for a class that VOC does not have.
    """
    if not folder.is_dir():
        raise DetectionsError(
            f"{folder}: no such folder of detections",
            hint="point --detections at a folder of `<prefix>_<class>.txt` files, as `eval --save-detections` writes",
        )
    matches = [match for path in sorted(folder.iterdir()) if (match := _CLASS_FILE.fullmatch(path.name))]
    prefixes = sorted({match["prefix"] for match in matches if match["name"] in LABEL_OF_CLASS})
    if not prefixes:
        raise DetectionsError(
            f"{folder}: expected files such as comp4_det_test_aeroplane.txt, found none for any VOC class",
            hint="name them `<prefix>_<class>.txt`, with the devkit's twenty class names",
        )
    if len(prefixes) > 1:
        raise DetectionsError(
            f"{folder}: expected the files of one detector, found the prefixes {', '.join(prefixes)}",
            hint="keep each detector's files in a folder of their own",
        )
    files = {match["name"]: folder / match.string for match in matches if match["prefix"] == prefixes[0]}
    unknown = sorted(files.keys() - LABEL_OF_CLASS.keys())
    if unknown:
        raise DetectionsError(
            f"{files[unknown[0]]}: {unknown[0]!r} is no VOC class; expected one of {', '.join(VOC_CLASSES)}",
            hint="rename or remove the file",
        )
    return {name: files[name] for name in VOC_CLASSES if name in files}


def _devkit(image_id: str) -> str:
    return image_id.rpartition("/")[0]


def _stem(image_id: str) -> str:
    return image_id.rpartition("/")[2]


def _index_by_written_id(image_ids: Sequence[str]) -> dict[bytes, int | None]:
    """Return the place of every id a file may use, full or bare; None for a bare id that fits two images."""
    index_of: dict[bytes, int | None] = {}
    for index, image_id in enumerate(image_ids):
        bare = _stem(image_id).encode()
        index_of[bare] = None if bare in index_of else index
    # Full ids last: they are unique, so nothing can make them ambiguous.
    return index_of | {image_id.encode(): index for index, image_id in enumerate(image_ids)}


def _read_class_file(path: Path, index_of: Mapping[bytes, int | None]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the image index [n] and score, xmin, ymin, xmax, ymax [5, n] of one file's lines."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DetectionsError(f"{path}: cannot be read ({error.strerror})") from error
    rows = [row for row in map(bytes.split, lines) if row]
    try:
        # All lines at once, since a test set has half a million; the culprit is looked for only when there is one.
        flat = np.fromiter(chain.from_iterable(rows), dtype=object)
        columns = flat.reshape(len(rows), 6)
        index = np.array([index_of[image_id] for image_id in columns[:, 0]], dtype=np.int64)
        numbers = columns[:, 1:].T.astype(np.float64)
        if set(map(len, rows)) <= {6} and _scorable(numbers):
            return index, numbers
    except (KeyError, TypeError, ValueError):
        pass
    for number, line in enumerate(lines, start=1):
        problem = _problem(line.split(), index_of)
        if problem is not None:
            raise DetectionsError(f"{path}:{number}: {problem}")
    raise AssertionError(f"{path}: refused as a whole, yet no line is wrong")


def _scorable(numbers: NDArray[np.float64]) -> bool:
    with np.errstate(over="ignore"):
        finite = np.isfinite(numbers.astype(np.float32)).all()
        # A box narrower than a pixel has xmax < xmin; it is inverted where xmax < xmin − 1, in the numbers as they are
        # kept: of an empty box that was written and read, both are the same float32 and not the same float64.
        ordered = numbers[3:].astype(np.float32) >= (numbers[1:3] - 1).astype(np.float32)
    return bool(finite and ordered.all())


def _problem(row: Sequence[bytes], index_of: Mapping[bytes, int | None]) -> str | None:
    """Return what is wrong with one line, split into its columns, or None."""
    if not row:
        return None
    if len(row) != 6:
        return f"expected the 6 columns {_COLUMNS}, found {len(row)}"
    image_id, *texts = (text.decode(errors="replace") for text in row)
    if row[0] not in index_of:
        return f"unknown image id {image_id!r}: the image sets being scored do not hold it"
    if index_of[row[0]] is None:
        return f"the image id {image_id!r} fits images of several years: write it in full, as in VOC2007/{image_id}"
    try:
        numbers = np.array([[float(text)] for text in row[1:]])
    except ValueError:
        return f"expected numbers in {_COLUMNS.partition(' ')[2]}, found {' '.join(texts)!r}"
    with np.errstate(over="ignore"):
        finite = np.isfinite(numbers.astype(np.float32))
    if not finite[0]:
        return f"expected a finite score, found {texts[0]}"
    if not finite.all():
        return f"expected a finite box, found {' '.join(texts[1:])}"
    if not _scorable(numbers):
        return f"expected xmin ≤ xmax and ymin ≤ ymax, found the inverted box {' '.join(texts[1:])}"
    return None
