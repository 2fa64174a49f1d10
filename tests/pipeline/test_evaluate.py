from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.errors import ImageError
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.average_precision import evaluate
from pipeline.evaluate import detect, draw_pictures, score_student
from tests.data.tiny_devkit import TinyDevkit

CPU = torch.device("cpu")


class Knowing(nn.Module):
    """Finds in each frame exactly the objects of the ground truth, whose frame boxes it computes by itself."""

    def __init__(self, records: list[ImageRecord], shift_px: float = 0.0) -> None:
        super().__init__()
        self.records = iter(records)
        self.shift_px = shift_px
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        self.modes.append(self.training)
        return [self.found(next(self.records)) for _ in images]

    def found(self, record: ImageRecord) -> dict[str, Tensor]:
        height, width = record.image_size
        boxes = [
            [480 * x1 / width + self.shift_px, 480 * y1 / height, 480 * x2 / width + self.shift_px, 480 * y2 / height]
            for x1, y1, x2, y2 in record.target.boxes_xyxy_orig.tolist()
        ]
        return {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.from_numpy(record.target.labels),
            "scores": torch.ones(len(boxes)),
        }


@pytest.fixture(scope="module")
def val_records(devkit: Path) -> list[ImageRecord]:
    return read_voc(devkit, ("2007:trainval",))


class TestAlignment:
    def test_a_student_that_finds_everything_scores_one(self, val_records: list[ImageRecord]) -> None:
        assert len({record.image_size for record in val_records}) > 2  # landscape, portrait, square
        _, result = score_student(Knowing(val_records), val_records, CPU)  # type: ignore[arg-type]
        assert result.mAP == 1.0
        assert set(result.per_iou.values()) == {1.0}

    def test_the_referee_notices_a_shift(self, val_records: list[ImageRecord]) -> None:
        _, result = score_student(Knowing(val_records, shift_px=8.0), val_records, CPU)  # type: ignore[arg-type]
        assert result.mAP is not None
        assert result.mAP < 0.9

    def test_boxes_come_back_in_pixels_of_the_original(self, val_records: list[ImageRecord]) -> None:
        found = detect(Knowing(val_records), val_records, CPU, batch_size=5)  # type: ignore[arg-type]
        assert found.image_ids == tuple(record.id for record in val_records)
        for record in val_records:
            detections = found.of_image(record.id)
            np.testing.assert_allclose(detections.boxes_xyxy_orig, record.target.boxes_xyxy_orig, atol=1e-3)
            np.testing.assert_array_equal(detections.labels, record.target.labels)


@pytest.mark.parametrize("training", [True, False])
def test_the_students_mode_is_put_back(val_records: list[ImageRecord], training: bool) -> None:
    student = Knowing(val_records[:3]).train(training)
    detect(student, val_records[:3], CPU, batch_size=2)  # type: ignore[arg-type]
    assert student.modes == [False, False]
    assert student.training is training


def test_the_students_mode_is_put_back_after_an_error(tmp_path: Path) -> None:
    tiny = TinyDevkit(tmp_path)
    tiny.add("000001")
    tiny.list("val", ["000001"])
    records = read_voc(tmp_path, ("2007:val",))
    tiny.image("000001").write_bytes(b"no image")
    student = Knowing(records).train()
    with pytest.raises(ImageError):
        detect(student, records, CPU)  # type: ignore[arg-type]
    assert student.training


def test_nothing_found_scores_zero(val_records: list[ImageRecord]) -> None:
    class Blind(Knowing):
        def found(self, record: ImageRecord) -> dict[str, Tensor]:
            return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}

    found = detect(Blind(val_records), val_records, CPU)  # type: ignore[arg-type]
    assert evaluate(found, val_records).mAP == 0.0


def test_pictures_are_spread_over_the_images(val_records: list[ImageRecord], tmp_path: Path) -> None:
    found = detect(Knowing(val_records), val_records, CPU)  # type: ignore[arg-type]
    paths = draw_pictures(found, val_records, tmp_path / "new" / "folder", 3)
    assert [path.name for path in paths] == ["VOC2007_000001.png", "VOC2007_000009.png", "VOC2007_000018.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 300
    assert draw_pictures(found, val_records, tmp_path / "none", 0) == []
    assert len(draw_pictures(found, val_records[:2], tmp_path / "all", 50)) == 2
