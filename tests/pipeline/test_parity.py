"""What a store holds of a view is what the teacher says, live, of the mirrored photograph; nothing else passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cache.manifest import StoredDtype
from cache.reader import TeacherStore, read_features
from data.geometry import View
from data.records import ImageRecord
from features.teacher import Teacher
from pipeline.extract import extract
from tests.pipeline.small_runs import extraction
from tests.teacher_families import FAMILIES

COUNT = 3
# Smallest 1st percentile of the cosine per token: the design's.
AT_LEAST: dict[StoredDtype, float] = {"float16": 0.9995, "int8": 0.995}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def live(teacher: Teacher, records: list[ImageRecord], view: View) -> dict[str, Tensor]:
    """What the teacher says of photographs that were mirrored and resized by Pillow's own calls."""
    height, width = teacher.input.size
    pixels = []
    for record in records[:COUNT]:
        image = Image.open(record.image_path).convert("RGB")
        image = ImageOps.mirror(image) if view == "hflip" else image
        pixels.append(np.asarray(image.resize((width, height), FILTERS[teacher.input.resample])))
    return teacher(torch.from_numpy(np.stack(pixels))).arrays()


def cosine_p01(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    cosines = (a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return float(np.percentile(cosines, 1))


CASES = [
    # The real sizes take ten seconds each, and the other grids and layers of the same code one.
    pytest.param(name, dtype, marks=pytest.mark.slow if small.full_size else ())
    for name, small in FAMILIES.items()
    for dtype in ("float16", "int8")
    if dtype == "float16" or "features" in small.arrays  # logits are float32 whatever the features are
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_each_view_is_the_live_teachers_and_the_other_view_is_not(
    name: str, dtype: StoredDtype, devkit: Path, records: list[ImageRecord], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    family.prepare(tmp_path)
    spec = family.spec.format(folder=tmp_path)
    config = extraction(
        devkit, tmp_path / "s.zarr", teachers=(f"t={spec}",), untrained=True, limit=COUNT, dtype=dtype, batch_size=COUNT
    )
    opened = TeacherStore(extract(config).store)
    teacher = family.build(tmp_path)
    for view in ("original", "hflip"):
        expected = {array: values.numpy() for array, values in live(teacher, records, view).items()}
        for array in sorted(family.arrays - {"features"}):
            stored = opened.array("t", view, array).gather(range(COUNT))
            np.testing.assert_allclose(stored, expected[array], rtol=1e-5, atol=1e-5)
            other = opened.array("t", "hflip" if view == "original" else "original", array).gather(range(COUNT))
            assert np.abs(other - expected[array]).max() > 1e-4 * np.abs(expected[array]).max()
        if "features" not in family.arrays:
            continue
        stored, original = (
            np.stack([read_features(opened, "t", shown, row) for row in range(COUNT)]) for shown in (view, "original")
        )
        assert cosine_p01(stored, expected["features"]) >= AT_LEAST[dtype]
        if view == "hflip":
            # The mirrored map of the original is not what the teacher says of the mirrored photograph.
            mirrored = cosine_p01(original[:, :, ::-1], expected["features"])
            assert 1 - mirrored >= 10 * (1 - AT_LEAST["float16"])
