"""Files of detections to read, and the images they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.records import VOC_CLASSES, ImageRecord, Target


def records_of(image_ids: Sequence[str], size: tuple[int, int] = (500, 500)) -> list[ImageRecord]:
    """Images without objects; size: (H, W)."""
    nothing = Target(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    return [ImageRecord(image_id, Path("image.jpg"), Path("image.xml"), size, nothing) for image_id in image_ids]


def class_files(folder: Path, prefix: str = "x", **texts: str) -> Path:
    """Write the devkit's twenty files, those of the given classes with a text and the others empty."""
    for name in VOC_CLASSES:
        (folder / f"{prefix}_{name}.txt").write_text(texts.get(name, ""), encoding="utf-8")
    return folder
