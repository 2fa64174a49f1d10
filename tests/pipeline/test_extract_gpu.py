"""Extraction on a GPU: three streams, page-locked buffers and batches in flight must not show in what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache.reader import TeacherStore, read_features
from data.errors import TeacherError
from features.teacher import TeacherOutput
from features.tiny import TinyDinoTeacher
from pipeline.batch_size import find_batch_size
from pipeline.extract import extract
from pipeline.teachers import TeacherChoices, build_teachers
from tests.pipeline.small_runs import extraction, files_of

pytestmark = pytest.mark.gpu


def cosines(one: Path, other: Path, view: str = "original") -> float:
    found = []
    for row in range(12):
        a, b = (read_features(TeacherStore(path), "tiny_dino", view, row).astype(np.float64) for path in (one, other))  # type: ignore[arg-type]
        found.append((a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))
    return float(np.percentile(found, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_says_what_the_cpu_says(devkit: Path, store: Path, tmp_path: Path, workers: int) -> None:
    out = extract(extraction(devkit, tmp_path / "gpu.zarr", device="cuda", workers=workers)).store
    assert cosines(out, store) >= 0.9999
    assert cosines(out, store, "hflip") >= 0.9999
    logits = [TeacherStore(path).array("tiny_clip", "hflip", "logits").gather(range(12)) for path in (out, store)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-2)


def test_two_runs_give_the_same_bytes(devkit: Path, tmp_path: Path) -> None:
    stores = [extract(extraction(devkit, tmp_path / f"{n}.zarr", device="cuda")).store for n in range(2)]
    assert files_of(stores[0]) == files_of(stores[1])


def test_bfloat16_is_close_and_another_teacher(devkit: Path, store: Path, tmp_path: Path) -> None:
    out = extract(extraction(devkit, tmp_path / "gpu.zarr", device="cuda", precision="bfloat16")).store
    assert cosines(out, store) >= 0.999
    identity = TeacherStore(out).catalog.teachers["tiny_dino"].manifest.identity
    assert identity["autocast"] == "bfloat16"


def test_the_time_on_the_device_is_told(devkit: Path, tmp_path: Path) -> None:
    done = extract(extraction(devkit, tmp_path / "gpu.zarr", device="cuda"))
    assert done.times.seconds["teacher"] > 0
    assert done.times.seconds["copy"] > 0


def test_a_value_that_is_not_finite_names_its_image(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TinyDinoTeacher.forward

    def spoiled(self: TinyDinoTeacher, pixels: torch.Tensor) -> TeacherOutput:
        output = forward(self, pixels)
        assert output.features is not None
        if len(pixels) == 3:  # not the probe's one image
            output.features[1, 2, 3, 4] = torch.nan
        return output

    monkeypatch.setattr(TinyDinoTeacher, "forward", spoiled)
    with pytest.raises(TeacherError, match=r"tiny_dino: features of VOC2007/000002 \(original\)"):
        extract(extraction(devkit, tmp_path / "gpu.zarr", device="cuda"))


def test_the_batch_size_is_found_by_running_out_of_memory() -> None:
    device = torch.device("cuda", 0)
    teachers = build_teachers(("dinov2_vits14",), TeacherChoices(untrained=True), device)
    size = find_batch_size(teachers.values(), device, 4096)
    assert size >= 1
    torch.cuda.synchronize()
