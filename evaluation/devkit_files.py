"""The devkit's own files of detections.

A folder holds one text file a class, `<prefix>_<class>.txt`, with a line `image_id score xmin ymin xmax ymax` for each
detection; boxes are 1-based and inclusive there, 0-based and half-open in `Detections` (x1 = xmin − 1, x2 = xmax). A
class in which nothing was found has an empty file.

Source: the VOC2007 development kit documentation, detection task, results file format.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import LABEL_OF_CLASS, VOC_CLASSES, ImageRecord

from .decimals import shortest
from .detections import Detections
from .file_rows import FileRows, scorable
from .written_ids import WrittenIds, short_ids

_COLUMNS = "image_id score xmin ymin xmax ymax"
_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE)
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
    shown = short_ids(detections.image_ids)
    shifts = (1.0, 1.0, 0.0, 0.0)  # xmin = x1 + 1, ymin = y1 + 1, xmax = x2, ymax = y2
    texts = {}
    for name, label in LABEL_OF_CLASS.items():
        rows = np.flatnonzero(detections.labels == label)
        boxes = detections.boxes_xyxy_orig[rows].T
        numbers = [
            shortest(detections.scores[rows]),
            *(shortest(column, shift) for column, shift in zip(boxes, shifts, strict=True)),
        ]
        columns = [map(repr, column.tolist()) for column in numbers]
        images = [shown[index] for index in detections.image_index[rows].tolist()]
        texts[name] = "".join(f"{' '.join(row)}\n" for row in zip(images, *columns, strict=True))
    return texts


def read_devkit(folder: Path, records: Sequence[ImageRecord]) -> tuple[Detections, list[str]]:
    """Return the detections that a folder of devkit files holds, by class and line, and notes, a line each.

    records: the images to score; the files may name them in full, `VOC2007/000005`, or bare, `000005`, where that fits
    one image only.

    Raises DetectionsError, naming file and line, for anything in it that cannot be scored.
    """
    files = find_class_files(folder)
    ids = WrittenIds([record.id for record in records])
    longest = max((len(record.id) for record in records), default=0)
    parts = [_read_class_file(path, longest) for path in files.values()]
    ends = np.cumsum([len(part) for part in parts])

    def where(row: int) -> str:
        return _place(list(files.values()), ends, row)[0]

    def box_text(row: int) -> str:
        return " ".join(_place(list(files.values()), ends, row)[1].split()[2:])

    joined = np.concatenate(parts)
    written = [name.decode("latin-1") for name in joined["id"].tolist()]
    places = ids.places(written)
    if None in places:
        row = places.index(None)
        written[row] = _place(list(files.values()), ends, row)[1].split()[0]  # whole, however long it is
        raise ids.refusal(where(row), row, written)
    rows = FileRows(
        image_index=np.array(places, dtype=np.int64),
        labels=np.repeat(np.array([LABEL_OF_CLASS[name] for name in files]), [len(part) for part in parts]),
        scores=joined["numbers"][:, 0].copy(),
        boxes_xyxy_orig=_half_open(joined["numbers"][:, 1:]),
        where=where,
        box_text=box_text,
    )
    return scorable(rows, records, ordered="xmin ≤ xmax and ymin ≤ ymax")


def _half_open(boxes: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # told as a box that is not finite
        shifted: NDArray[np.float32] = (boxes - np.array([1.0, 1.0, 0.0, 0.0])).astype(np.float32)
    return shifted


def find_class_files(folder: Path) -> dict[str, Path]:
    """Return the folder's twenty detection files by class name, in the devkit's order.

    Raises DetectionsError for a missing folder, one without such a file, with two prefixes, or with a file of that
    prefix for a class that VOC does not have, or without one for a class that it has.
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
    missing = [f"{prefixes[0]}_{name}.txt" for name in VOC_CLASSES if name not in files]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DetectionsError(
            f"{folder / missing[0]}: no such file{others}; expected one for each of the twenty classes",
            hint=f"where nothing was found of a class, say so by an empty file: touch {folder / missing[0]}",
        )
    return {name: files[name] for name in VOC_CLASSES}


def _read_class_file(path: Path, longest_id: int) -> NDArray[np.void]:
    """Return a file's lines [n] as `id`, cut just beyond the longest id that may be known, and `numbers` [5]."""
    dtype = np.dtype([("id", f"S{longest_id + 1}"), ("numbers", np.float64, (5,))])
    try:
        if not path.stat().st_size:
            return np.zeros(0, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input contained no data", category=UserWarning)
            return np.loadtxt(path, dtype=dtype, comments=None, encoding="latin-1", ndmin=1)
    except OSError as error:
        raise DetectionsError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        for number, line in _lines(path):
            problem = _problem(line)
            if problem is not None:
                raise DetectionsError(f"{path}:{number}: {problem}") from error
        raise DetectionsError(f"{path}: cannot be read as detections ({error})") from error


def _problem(line: str) -> str | None:
    """Return why one line cannot be read, or None."""
    _, *texts = line.split()
    if len(texts) != 5:
        return f"expected the 6 columns {_COLUMNS}, found {len(texts) + 1}"
    if not all(map(_NUMBER.fullmatch, texts)):
        return f"expected numbers in {_COLUMNS.partition(' ')[2]}, found {' '.join(texts)!r}"
    return None


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a file that are not blank, with their numbers from 1 on."""
    # Lines end as numpy ends them: str.splitlines would also cut at control characters.
    lines = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode("latin-1").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _place(paths: Sequence[Path], ends: NDArray[np.int64], row: int) -> tuple[str, str]:
    """Return `file:line` and the line itself of a row counted over all files."""
    which = int(np.searchsorted(ends, row, side="right"))
    first = 0 if which == 0 else int(ends[which - 1])
    number, line = _lines(paths[which])[row - first]
    return f"{paths[which]}:{number}", line
