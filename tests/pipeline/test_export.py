import errno
import hashlib
import json
import os
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.jit import TracerWarning
from torchvision.models.detection import FasterRCNN

import pipeline.export
from data.errors import CheckpointError, TeachOnceError, UsageError
from data.images import decode_image, squash
from data.records import VOC_CLASSES, ImageRecord
from data.voc import read_voc
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.export import Exported, ExportRequest, export, export_lines
from pipeline.export_formats import load_detector, onnx_model
from students.config import StudentConfig
from students.detector import Student
from tests.conftest import REPOSITORY
from tests.pipeline.small_runs import SMALL_STUDENT, save_student, small_run

CPU = torch.device("cpu")
Arrays = list[np.ndarray[Any, Any]]


def save(folder: Path, devkit: Path, student: StudentConfig = SMALL_STUDENT, **changes: Any) -> Path:
    """Save a seeded student of a run on the devkit."""
    path = save_student(folder, student, **changes)
    config = small_run(devkit, folder, student=student).resolved()
    save_checkpoint(path, replace(load_checkpoint(path), config=config))
    return path


def frame_of(record: ImageRecord) -> torch.Tensor:
    return torch.from_numpy(squash(decode_image(record))).permute(2, 0, 1)[None].float() / 255


def student_of(checkpoint: Path) -> Student:
    return load_checkpoint(checkpoint).build_student(CPU)


def by_pytorch(student: Student, frame: torch.Tensor) -> Arrays:
    with torch.no_grad():
        results = student(frame)
    assert isinstance(results, list)
    return [results[0][name].numpy() for name in ("boxes", "labels", "scores")]


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def by_onnxruntime(session: Any, frame: torch.Tensor) -> Arrays:
    return session.run(["boxes", "labels", "scores"], {"image": frame.numpy()})  # type: ignore[no-any-return]


def assert_same_detections(found: Arrays, expected: Arrays) -> None:
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3, rtol=0)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], atol=3e-5, rtol=0)


@pytest.fixture(scope="module")
def val_records(devkit: Path) -> list[ImageRecord]:
    return read_voc(devkit, ("2007:val",))


@pytest.fixture(scope="module")
def checkpoint(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = {"source": "store", "untrained": ["tiny_dino", "tiny_clip"]}
    return save(tmp_path_factory.mktemp("saved"), devkit, targets=targets)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(ExportRequest(checkpoint, tmp_path_factory.mktemp("exported") / "student.onnx", check_images=3))


@pytest.fixture(scope="module")
def detector(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(ExportRequest(checkpoint, tmp_path_factory.mktemp("exported") / "detector.pth", check_images=3))


class TestOnnx:
    @pytest.mark.parametrize(
        "backbone",
        ["mobilenet_v3_small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "vit_tiny"))],
    )
    def test_onnxruntime_finds_what_pytorch_finds(
        self, devkit: Path, tmp_path: Path, val_records: list[ImageRecord], backbone: str
    ) -> None:
        saved = save(tmp_path, devkit, SMALL_STUDENT.model_copy(update={"backbone": backbone}))
        done = export(ExportRequest(saved, tmp_path / "student.onnx", check_images=1))
        student, session = student_of(saved), session_of(done.path)
        for record in val_records[:2]:
            expected = by_pytorch(student, frame_of(record))
            assert len(expected[2]) > 20
            assert_same_detections(by_onnxruntime(session, frame_of(record)), expected)

    @pytest.mark.voc
    def test_real_images_agree(self, checkpoint: Path, voc_root: Path, tmp_path: Path) -> None:
        done = export(
            ExportRequest(checkpoint, tmp_path / "m.onnx", check_images=4, voc_root=voc_root, voc_sets=("2007:val",))
        )
        assert done.agreement is not None
        assert done.agreement.images == 4
        assert done.agreement.detections > 20
        assert done.agreement.box_px < 1e-3
        assert done.agreement.score < 3e-5
        assert done.agreement.unpaired == 0

    def test_the_interface_is_one_frame_in_and_boxes_labels_scores_out(self, exported: Exported) -> None:
        session = session_of(exported.path)
        shapes = [(x.name, x.type, x.shape) for x in (*session.get_inputs(), *session.get_outputs())]
        assert shapes == [
            ("image", "tensor(float)", [1, 3, 480, 480]),
            ("boxes", "tensor(float)", ["detections", 4]),
            ("labels", "tensor(int64)", ["detections"]),
            ("scores", "tensor(float)", ["detections"]),
        ]

    def test_the_file_says_what_it_is(self, exported: Exported, checkpoint: Path) -> None:
        model = onnx.load(exported.path)
        assert model.producer_name == "TeachOnce"
        assert [(imported.domain, imported.version) for imported in model.opset_import] == [("", 17)]
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(said["class_names"]) == list(VOC_CLASSES)
        assert json.loads(said["frame"]) == [480, 480]
        assert json.loads(said["mean"]) == [0.485, 0.456, 0.406]
        assert json.loads(said["std"]) == [0.229, 0.224, 0.225]
        assert said["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        assert json.loads(said["untrained_teachers"]) == ["tiny_dino", "tiny_clip"]
        assert (said["backbone"], said["run_name"], said["epoch"]) == ("mobilenet_v3_small", "run", "1")

    def test_only_the_detector_is_in_it(self, exported: Exported, devkit: Path) -> None:
        content = exported.path.read_bytes()
        assert b"roi_heads" in content
        for foreign in ("logit_head", "site-packages", str(REPOSITORY), str(devkit)):
            assert foreign.encode() not in content

    def test_the_same_checkpoint_gives_the_same_bytes(self, exported: Exported, checkpoint: Path) -> None:
        student = student_of(checkpoint)
        assert onnx_model(student, exported.description, 17) == exported.path.read_bytes()

    @pytest.mark.parametrize("opset", [16, pytest.param(20, marks=pytest.mark.slow)])
    def test_other_opsets_agree_too(self, checkpoint: Path, tmp_path: Path, opset: int) -> None:
        done = export(ExportRequest(checkpoint, tmp_path / "student.onnx", opset=opset, check_images=1))
        assert done.agreement is not None
        assert done.agreement.unpaired == 0
        assert onnx.load(done.path).opset_import[0].version == opset

    def test_an_image_without_a_detection_gives_empty_outputs(
        self, devkit: Path, checkpoint: Path, val_records: list[ImageRecord], tmp_path: Path
    ) -> None:
        student = student_of(checkpoint)
        best = sorted((by_pytorch(student, frame_of(record))[2][0].item(), record.id) for record in val_records)
        threshold = (best[0][0] + best[1][0]) / 2
        saved = save(tmp_path, devkit, SMALL_STUDENT.model_copy(update={"score_threshold": threshold}))
        done = export(ExportRequest(saved, tmp_path / "student.onnx", check_images=6))
        student, session = student_of(saved), session_of(done.path)
        for record in val_records:
            found = by_onnxruntime(session, frame_of(record))
            if record.id == best[0][1]:
                assert [array.shape for array in found] == [(0, 4), (0,), (0,)]
            else:
                assert_same_detections(found, by_pytorch(student, frame_of(record)))

    def test_a_backbone_that_onnx_cannot_express_is_named(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        student = student_of(checkpoint)
        plain = student.detector.backbone.neck.forward
        monkeypatch.setattr(
            student.detector.backbone.neck, "forward", lambda maps: plain([torch.special.i1(m) for m in maps])
        )
        message = r"^mobilenet_v3_small: cannot be exported to ONNX opset 17 \(.*special_i1.*\)"
        with pytest.raises(TeachOnceError, match=message) as caught:
            onnx_model(student, {}, 17)
        assert caught.value.hint == "try another --opset, or --format torch"
        assert capfd.readouterr().out == ""

    def test_only_what_the_exporter_says_is_silenced(
        self, exported: Exported, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def speak(_: nn.Module, __: Any, buffer: Any, **___: Any) -> None:
            warnings.warn("this value will be treated as a constant", TracerWarning, stacklevel=1)
            warnings.warn("a divide by zero", RuntimeWarning, stacklevel=1)
            warnings.warn("another deprecation", DeprecationWarning, stacklevel=1)
            buffer.write(exported.path.read_bytes())

        monkeypatch.setattr(torch.onnx, "export", speak)
        student = student_of(checkpoint)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            onnx_model(student, {}, 17)
        assert {str(warning.message) for warning in heard} == {"a divide by zero", "another deprecation"}


class TestTorchFile:
    def test_torchvisions_own_detector_finds_the_same_with_it(
        self, detector: Exported, checkpoint: Path, val_records: list[ImageRecord]
    ) -> None:
        loaded, student = load_detector(detector.path), student_of(checkpoint)
        assert type(loaded) is FasterRCNN
        assert not loaded.training
        for record in val_records[:2]:
            with torch.no_grad():
                found = loaded([frame_of(record)[0]])[0]
            for name, expected in zip(
                ("boxes", "labels", "scores"), by_pytorch(student, frame_of(record)), strict=True
            ):
                np.testing.assert_array_equal(found[name].numpy(), expected)

    def test_it_holds_the_detector_and_nothing_of_training(self, detector: Exported, checkpoint: Path) -> None:
        content = torch.load(detector.path, weights_only=True)
        assert set(content) == {
            "detector_format", "student", "detector", "backbone", "class_names", "frame", "mean", "std", "run_name",
            "epoch", "checkpoint_sha256", "untrained_teachers",
        }  # fmt: skip
        saved = load_checkpoint(checkpoint).student
        expected = {key.removeprefix("detector.") for key in saved if key.startswith("detector.")}
        assert set(content["detector"]) == expected
        assert any(key.startswith("logit_head.") for key in saved)

    def test_eval_does_not_take_it_for_a_checkpoint(self, detector: Exported) -> None:
        with pytest.raises(CheckpointError, match="a torch file, but not a TeachOnce checkpoint"):
            load_checkpoint(detector.path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"<html>", None, {"format": 1}, {"detector_format": 2}],
        ids=["empty", "html", "cut", "other", "newer"],
    )
    def test_other_files_are_refused(self, detector: Exported, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "detector.pth"
        if isinstance(content, dict):
            torch.save(content, path)
        else:
            path.write_bytes(detector.path.read_bytes()[:-100] if content is None else content)
        with pytest.raises(CheckpointError, match=r"detector\.pth: (cannot be read|expected format 1, found 2)"):
            load_detector(path)
        with pytest.raises(CheckpointError, match="No such file"):
            load_detector(tmp_path / "typo.pth")


class TestWriting:
    def test_a_model_that_finds_something_else_is_not_written(
        self, devkit: Path, tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved = save(tmp_path / "run", devkit, SMALL_STUDENT.model_copy(update={"detections_per_image": 7}))
        monkeypatch.setattr(pipeline.export, "onnx_model", lambda *_: exported.path.read_bytes())
        with pytest.raises(
            TeachOnceError, match=r"not written: expected PyTorch's detections .* where PyTorch"
        ) as caught:
            export(ExportRequest(saved, tmp_path / "out" / "student.onnx", check_images=2))
        assert caught.value.exit_code == 1
        assert "only the exported model finds label" in caught.value.message
        assert list((tmp_path / "out").iterdir()) == []

    def test_what_onnxruntime_refuses_is_not_written(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline.export, "onnx_model", lambda *_: b"no model")
        with pytest.raises(TeachOnceError, match=r"onnxruntime .* cannot run the exported model"):
            export(ExportRequest(checkpoint, tmp_path / "out" / "student.onnx", check_images=1))
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_full_disk_leaves_nothing(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(TeachOnceError, match=r"detector\.pth: cannot be written \(No space left") as caught:
            export(ExportRequest(checkpoint, tmp_path / "out" / "detector.pth", check_images=1))
        assert caught.value.hint == "free some space, or choose another --out"
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_file_in_the_folders_place_is_told(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        with pytest.raises(TeachOnceError, match="cannot be written"):
            export(ExportRequest(checkpoint, tmp_path / "file" / "detector.pth", check_images=1))

    def test_what_is_there_already_stays(self, tmp_path: Path) -> None:
        taken, dangling = tmp_path / "student.onnx", tmp_path / "link.onnx"
        taken.write_text("kept")
        dangling.symlink_to(tmp_path / "nowhere")
        for out in (taken, dangling):
            with pytest.raises(UsageError, match="something is here already") as caught:
                export(ExportRequest(tmp_path / "any.pth", out))
            assert caught.value.hint == "choose another --out, or remove this file first"
        assert taken.read_text() == "kept"

    def test_a_folder_is_no_place_for_it(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="expected a file to write, found a folder"):
            export(ExportRequest(tmp_path / "any.pth", tmp_path))

    def test_a_missing_checkpoint_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            export(ExportRequest(tmp_path / "typo.pth", tmp_path / "student.onnx"))

    def test_a_torch_file_has_no_opset(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--opset is for ONNX"):
            export(ExportRequest(tmp_path / "any.pth", tmp_path / "detector.pth", opset=17))

    def test_without_onnx_the_command_that_installs_it_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(TeachOnceError, match="needs the package onnx") as caught:
            export(ExportRequest(tmp_path / "any.pth", tmp_path / "student.onnx"))
        assert caught.value.hint == "python -m pip install 'onnx>=1.17' onnxruntime"

    def test_without_onnxruntime_it_is_said_that_nothing_was_compared(
        self, exported: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(pipeline.export, "onnx_model", lambda *_: exported.path.read_bytes())
        done = export(ExportRequest(checkpoint, tmp_path / "student.onnx", check_images=1))
        assert done.path.read_bytes() == exported.path.read_bytes()
        assert export_lines(done)[-2:] == [
            "NOT compared with PyTorch: onnxruntime is not installed",
            "next: python -m pip install onnxruntime",
        ]


class TestLines:
    def test_they_say_what_was_written_and_how_close_it_is(self, exported: Exported) -> None:
        wrote, untrained, compared, following = export_lines(exported)
        assert wrote.startswith(f"wrote {exported.path}: mobilenet_v3_small, run run, epoch 1; ONNX, opset 17, 11.")
        assert untrained == "UNTRAINED teachers: tiny_dino, tiny_clip"
        assert compared.startswith("compared with PyTorch on 3 images of 2007:val: ")
        assert following.startswith("next: python -c ")

    def test_the_next_command_runs(
        self, exported: Exported, detector: Exported, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for done, printed in ((exported, "dtype=float32"), (detector, "'boxes': tensor")):
            command = shlex.split(export_lines(done)[-1].removeprefix("next: "))
            assert command[:2] == ["python", "-c"]
            exec(command[2])
            assert printed in capsys.readouterr().out

    def test_a_detector_that_finds_nothing_is_told(self, devkit: Path, tmp_path: Path) -> None:
        saved = save(tmp_path, devkit, SMALL_STUDENT.model_copy(update={"score_threshold": 0.9999}))
        done = export(ExportRequest(saved, tmp_path / "detector.pth", check_images=1))
        assert export_lines(done)[1] == (
            "compared with PyTorch on 1 image of 2007:val: neither finds anything there, which says little"
        )
