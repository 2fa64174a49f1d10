"""What happens between decoded images and a store's buffers: memory that runs out, values that are not finite, time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import features.tiny
from cache.reader import TeacherStore
from data.errors import TeacherError
from data.geometry import VIEWS
from data.voc import read_voc
from features.registry import build_teacher
from features.teacher import Teacher, TeacherOutput
from pipeline.batch_size import CPU_BATCH_SIZE, find_batch_size
from pipeline.extract import extract
from pipeline.inspection import inspect_store
from pipeline.stage_times import Lane, Span, StageTimes
from pipeline.teacher_check import logit_teacher_maps
from pipeline.teacher_runner import is_out_of_memory
from tests.pipeline.small_runs import extraction

CPU = torch.device("cpu")


def memory_for(monkeypatch: pytest.MonkeyPatch, images: int, error: Callable[[], RuntimeError]) -> list[int]:
    """Let tiny_dino run out of memory beyond so many images; return the sizes of the batches it ran."""
    ran: list[int] = []
    forward = features.tiny.TinyDinoTeacher.forward

    def limited(self: features.tiny.TinyDinoTeacher, pixels: Tensor) -> TeacherOutput:
        if len(pixels) > images:
            raise error()
        ran.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(features.tiny.TinyDinoTeacher, "forward", limited)
    return ran


def cuda_error() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory")


def cpu_error() -> RuntimeError:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


class TestMemory:
    @pytest.mark.parametrize("error", [cuda_error, cpu_error], ids=["on a GPU", "on the CPU"])
    def test_a_batch_that_does_not_fit_is_halved_and_the_rest_goes_on_with_it(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], RuntimeError]
    ) -> None:
        asked = {"teachers": ("tiny_dino",), "shard_samples": 12, "batch_size": 12}
        whole = extract(extraction(devkit, tmp_path / "whole.zarr", **asked)).store
        ran = memory_for(monkeypatch, 3, error)
        halved = extract(extraction(devkit, tmp_path / "halved.zarr", **asked)).store
        # The probe's one image, then 12 of each view as 12 → 6 → 3.
        assert ran == [1] + 8 * [3]
        for view in VIEWS:
            found, expected = (
                TeacherStore(path).array("tiny_dino", view, "features").gather(range(12)).astype(np.float64)
                for path in (halved, whole)
            )
            norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
            assert ((found * expected).sum(axis=-1) / norms).min() >= 0.9999

    def test_provenance_tells_halvings_and_the_recorded_batch_size_stays(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory_for(monkeypatch, 2, cuda_error)
        out = tmp_path / "s.zarr"
        extract(extraction(devkit, out, teachers=("tiny_dino", "tiny_clip"), shard_samples=4, batch_size=4))
        note = json.loads((out / "tiny_dino/hflip/features/provenance.jsonl").read_text())
        assert note["out_of_memory_halvings"] == [{"from": 4, "to": 2}]
        assert note["batch_size"] == 4
        other = json.loads((out / "tiny_clip/hflip/logits/provenance.jsonl").read_text().splitlines()[0])
        assert "out_of_memory_halvings" not in other

    def test_too_little_memory_for_one_image_ends_the_run(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_dino",))
        monkeypatch.setattr("pipeline.extract.probe", lambda _: np.ones(4, dtype=np.float32))
        memory_for(monkeypatch, 0, cuda_error)
        with pytest.raises(TeacherError, match="tiny_dino: cpu has too little memory for one image"):
            extract(config)

    def test_another_runtime_error_is_not_taken_for_it(self) -> None:
        assert not is_out_of_memory(RuntimeError("sizes of tensors must match"))
        assert is_out_of_memory(cuda_error())
        assert is_out_of_memory(cpu_error())


class TestBatchSize:
    def test_on_the_cpu_it_is_fixed_but_never_beyond_a_shard(self) -> None:
        teachers = [build_teacher("tiny_dino")]
        assert find_batch_size(teachers, CPU, 64) == CPU_BATCH_SIZE
        assert find_batch_size(teachers, CPU, 5) == 5

    def test_elsewhere_a_shard_is_halved_until_every_teacher_has_run_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small, large = build_teacher("tiny_clip"), build_teacher("tiny_dino")
        ran = memory_for(monkeypatch, 20, cuda_error)
        monkeypatch.setattr(Teacher, "__call__", run_on_meta)
        assert find_batch_size([small, large], torch.device("meta"), 64) == 16
        assert ran == [16]

    def test_a_device_without_room_for_one_image_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory_for(monkeypatch, 0, cuda_error)
        monkeypatch.setattr(Teacher, "__call__", run_on_meta)
        with pytest.raises(TeacherError, match="meta has too little memory for one image"):
            find_batch_size([build_teacher("tiny_dino")], torch.device("meta"), 8)

    def test_what_was_found_is_recorded_and_reused(self, devkit: Path, tmp_path: Path) -> None:
        out = tmp_path / "s.zarr"
        extract(extraction(devkit, out, teachers=("tiny_clip",), batch_size=None, shard_samples=6))
        view = TeacherStore(out).catalog.teachers["tiny_clip"].views["original"]
        assert view.manifest.layout.batch_size == 6
        note = json.loads((out / "tiny_clip/original/logits/provenance.jsonl").read_text().splitlines()[0])
        assert note["batch_size"] == 6


def run_on_meta(self: Teacher, images: Tensor) -> TeacherOutput:
    """Stands in for a device of limited memory: the forward pass is what counts."""
    return self.forward(torch.zeros(len(images), 3, *self.input.size))


class TestTimes:
    def test_shares_are_of_the_wall_time_and_the_largest_is_the_bottleneck(self) -> None:
        times = StageTimes(seconds={"decode": 6.0, "teacher": 2.0, "copy": 0.5, "disk": 1.0}, images=40, wall=8.0)
        assert times.shares == {"decode": 0.75, "teacher": 0.25, "copy": 0.0625, "disk": 0.125}
        assert times.line() == "5.0 images/s; bottleneck: decode, 75% of the time (teacher 25%, copy 6%, disk 12%)"
        assert times.facts() == {
            "seconds": 8.0,
            "images_per_second": 5.0,
            "bottleneck": "decode",
            "shares": times.shares,
        }

    def test_a_pass_that_did_nothing_has_no_shares(self) -> None:
        assert set(StageTimes().shares.values()) == {0.0}
        assert StageTimes().images_per_second == 0.0

    def test_the_cpu_lane_measures_its_block(self) -> None:
        lane, spans = Lane(CPU), list[Span]()
        with lane.work(spans):
            torch.ones(2)
        assert len(spans) == 1
        assert spans[0].seconds() >= 0

    def test_a_run_tells_where_its_time_went(self, devkit: Path, tmp_path: Path) -> None:
        out = tmp_path / "s.zarr"
        done = extract(extraction(devkit, out))
        assert done.times.images == 12
        assert done.times.wall > 0
        # On the CPU nothing overlaps but the writing: what teachers took is their share of the wall time.
        assert done.times.seconds["teacher"] == pytest.approx(sum(done.seconds_by_teacher.values()))
        assert sum(done.times.seconds[stage] for stage in ("decode", "teacher", "copy")) <= done.times.wall
        note = json.loads((out / "tiny_dino/original/features/provenance.jsonl").read_text())
        assert note["pass"] == done.times.facts()
        assert (note["rank"], note["ranks"]) == (0, 1)


def test_the_logit_teachers_map_is_noted_once_and_shown(devkit: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    for _ in range(2):
        extract(extraction(devkit, out))
    records = read_voc(devkit, ("2007:train",))
    expected = logit_teacher_maps(out, records)["tiny_clip"]
    lines = (out / "tiny_clip/original/logits/provenance.jsonl").read_text().splitlines()
    assert [json.loads(line).get("multilabel_map") for line in lines] == [None, expected]
    teachers = inspect_store(out, verify=False)["teachers"]
    assert teachers["tiny_clip"]["multilabel_map"] == expected
    assert teachers["tiny_dino"]["multilabel_map"] is None
