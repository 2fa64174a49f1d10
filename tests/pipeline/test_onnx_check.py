from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DatasetError
from data.voc import read_voc
from pipeline.config import TrainConfig
from pipeline.onnx_check import Agreement, FrameDetections, check_images, compare
from tests.pipeline.small_runs import small_run


class TestCheckImages:
    def config(self, voc_root: Path) -> TrainConfig:
        return small_run(voc_root, Path("out"))

    def test_they_are_spread_over_the_runs_validation_images(self, devkit: Path) -> None:
        val_records = read_voc(devkit, ("2007:val",))
        images = check_images(self.config(devkit), 3)
        assert images.ids == [val_records[place].id for place in (0, 2, 5)]
        with Image.open(val_records[2].image_path) as picture:
            pixels = np.asarray(picture.resize((480, 480), Image.Resampling.BILINEAR), dtype=np.float32)
        np.testing.assert_allclose(images.frames[1][0].permute(1, 2, 0).numpy(), pixels / 255, atol=1e-7)
        assert images.what == "of 2007:val"
        assert len(check_images(self.config(devkit), 100).ids) == 6

    def test_sets_can_be_chosen(self, devkit: Path) -> None:
        images = check_images(self.config(Path("gone")), 1, devkit, ("2007:train",))
        assert (images.ids, images.what) == (["VOC2007/000001"], "of 2007:train")

    def test_they_are_drawn_where_the_devkit_is_not(self) -> None:
        images = check_images(self.config(Path("gone")), 2)
        assert images.what == "drawn (no gone here)"
        assert [tuple(frame.shape) for frame in images.frames] == [(1, 3, 480, 480)] * 2
        assert not torch.equal(*images.frames)

    def test_a_devkit_that_was_named_must_be_there(self) -> None:
        with pytest.raises(DatasetError):
            check_images(self.config(Path("gone")), 2, Path("typo"))
        with pytest.raises(DatasetError):
            check_images(self.config(Path("gone")), 2, None, ("2007:val",))


def detections(*rows: tuple[float, int, float]) -> FrameDetections:
    """Boxes of 50 × 50 px whose left edge is given, with label and score."""
    return FrameDetections(
        np.array([[x, 10, x + 50, 60] for x, _, _ in rows], dtype=np.float32).reshape(-1, 4),
        np.array([label for _, label, _ in rows], dtype=np.int64),
        np.array([score for _, _, score in rows], dtype=np.float32),
    )


class TestCompare:
    def compared(self, ours: FrameDetections, theirs: FrameDetections) -> Agreement:
        return compare([ours], [theirs], ["image 0"])

    def test_the_largest_differences_are_told(self) -> None:
        ours = detections((10, 3, 0.9), (200, 4, 0.5))
        agreement = self.compared(ours, detections((10.004, 3, 0.9), (200, 4, 0.50005)))
        assert agreement.box_px == pytest.approx(0.004, abs=1e-5)
        assert agreement.score == pytest.approx(5e-5, abs=1e-7)
        assert (agreement.images, agreement.detections, agreement.reordered, agreement.unpaired) == (1, 2, 0, 0)
        assert agreement.holds

    def test_near_ties_may_change_places(self) -> None:
        rows = ((10, 3, 0.9), (200, 4, 0.50001), (300, 4, 0.5))
        agreement = self.compared(detections(*rows), detections(rows[0], rows[2], rows[1]))
        assert (agreement.reordered, agreement.unpaired) == (2, 0)
        assert agreement.holds

    @pytest.mark.parametrize(
        "other",
        [(10.02, 3, 0.9), (10, 4, 0.9), (10, 3, 0.8998)],
        ids=["the box", "the label", "the score"],
    )
    def test_another_detection_is_no_counterpart(self, other: tuple[float, int, float]) -> None:
        agreement = self.compared(detections((10, 3, 0.9)), detections(other))
        assert agreement.unpaired == 2
        assert not agreement.holds
        assert agreement.first_unpaired == (
            "image 0: only PyTorch finds label 3 (bird), score 0.90000, 10.00, 10.00, 60.00, 60.00"
        )

    def test_a_row_is_a_counterpart_once(self) -> None:
        twice = detections((10, 3, 0.9), (10, 3, 0.9))
        agreement = self.compared(twice, detections((10, 3, 0.9)))
        assert (agreement.detections, agreement.unpaired) == (2, 1)

    def test_one_in_a_hundred_may_be_without(self) -> None:
        rows = [(4.0 * place, 3, 0.9 - 0.01 * place) for place in range(50)]
        ours, theirs = detections(*rows), detections(*rows[:-1])
        assert self.compared(ours, theirs).holds  # one row of 99
        assert not self.compared(ours, detections(*rows[:-2])).holds

    def test_nothing_found_agrees_with_nothing_only(self) -> None:
        none, one = detections(), detections((10, 3, 0.9))
        assert self.compared(none, none).holds
        assert not self.compared(none, one).holds
        assert self.compared(none, one).first_unpaired == (
            "image 0: only the exported model finds label 3 (bird), score 0.90000, 10.00, 10.00, 60.00, 60.00"
        )
        assert not self.compared(one, none).holds
