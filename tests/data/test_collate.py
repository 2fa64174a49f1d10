from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data.collate import Batch, collate
from data.geometry import VIEWS, View
from data.records import ImageRecord
from data.sample import Sample, load_sample
from data.synthetic import make_devkit
from data.voc import read_voc


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    """Three images; the first has no object."""
    root = make_devkit(tmp_path_factory.mktemp("collate"), num_train=3, num_val=0, num_empty=1, seed=2)
    return read_voc(root, ["2007:train"])


@pytest.fixture(scope="module")
def samples(records: list[ImageRecord]) -> list[Sample]:
    views: Sequence[View] = ("original", "hflip", "original")
    return [load_sample(record, view) for record, view in zip(records, views, strict=True)]


def test_a_sample_is_its_view_in_the_frame(records: list[ImageRecord]) -> None:
    record = records[1]
    height, width = record.image_size
    original, mirrored = (load_sample(record, view) for view in VIEWS)
    assert (original.image.shape, original.image.dtype) == ((480, 480, 3), np.uint8)
    assert (original.id, original.view, mirrored.view) == (record.id, "original", "hflip")
    assert original.image_size == record.image_size
    scale = np.array([480 / width, 480 / height] * 2)
    np.testing.assert_allclose(original.boxes_xyxy, record.target.boxes_xyxy_orig * scale, rtol=1e-6)
    np.testing.assert_allclose(480 - mirrored.boxes_xyxy[:, 2], original.boxes_xyxy[:, 0], atol=1e-3)
    np.testing.assert_array_equal(mirrored.labels, record.target.labels)
    # Mirroring before or after the resize may differ in rounding only.
    assert np.abs(mirrored.image[:, ::-1].astype(int) - original.image).max() <= 1


def test_a_sample_can_be_made_of_bytes_read_before(records: list[ImageRecord]) -> None:
    data = records[1].image_path.read_bytes()
    np.testing.assert_array_equal(load_sample(records[1], "original", data).image, load_sample(records[1]).image)


def test_a_batch_keeps_order_ids_views_and_pixels(samples: list[Sample]) -> None:
    batch = collate(samples)
    assert len(batch) == 3
    assert batch.ids == ("VOC2007/000001", "VOC2007/000002", "VOC2007/000003")
    assert batch.views == ("original", "hflip", "original")
    assert batch.image_sizes == tuple(sample.image_size for sample in samples)
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 480, 480), torch.uint8)
    assert batch.images.is_contiguous()
    for image, sample in zip(batch.images, samples, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), sample.image)


def test_targets_have_the_types_a_torchvision_detector_takes(samples: list[Sample]) -> None:
    for target, sample in zip(collate(samples).targets, samples, strict=True):
        n = len(sample.labels)
        assert (target["boxes"].shape, target["boxes"].dtype) == ((n, 4), torch.float32)
        assert (target["labels"].shape, target["labels"].dtype) == ((n,), torch.int64)
        assert (target["difficult"].shape, target["difficult"].dtype) == ((n,), torch.bool)
    assert collate(samples).targets[0]["boxes"].shape == (0, 4)


def test_a_torchvision_detector_trains_on_a_batch_with_an_empty_image(samples: list[Sample]) -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=21)
    batch = collate(samples)
    losses = detector(list(batch.images_float()), list(batch.targets))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_changing_a_batch_leaves_the_record_alone(records: list[ImageRecord]) -> None:
    batch = collate([load_sample(records[1])])
    before = records[1].target.labels.copy()
    batch.targets[0]["labels"].zero_()
    np.testing.assert_array_equal(records[1].target.labels, before)


def test_float_images_are_the_bytes_over_255(samples: list[Sample]) -> None:
    batch = collate(samples)
    pixels = batch.images_float()
    assert pixels.dtype == torch.float32
    assert torch.equal((pixels * 255).round().to(torch.uint8), batch.images)
    assert batch.images.dtype == torch.uint8
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_moving_a_batch_moves_every_tensor(samples: list[Sample]) -> None:
    moved = collate(samples).to("meta", non_blocking=True)
    assert moved.images.is_meta
    assert all(tensor.is_meta for target in moved.targets for tensor in target.values())
    assert moved.ids == collate(samples).ids


@pytest.mark.gpu
def test_a_pinned_batch_reaches_the_device_unchanged(samples: list[Sample]) -> None:
    batch = collate(samples).pin_memory()
    assert batch.images.is_pinned()
    moved = batch.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(moved.images.cpu(), batch.images)


def test_no_sample_makes_no_batch() -> None:
    with pytest.raises(ValueError, match="expected at least one sample"):
        collate([])


class _Samples(Dataset[Sample]):
    def __init__(self, records: list[ImageRecord]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return load_sample(self.records[index])


# Python 3.12 warns of every fork of a process with threads, and torch has threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_come_out_of_loader_workers_whole(records: list[ImageRecord]) -> None:
    loader: DataLoader[Batch] = DataLoader(_Samples(records), batch_size=2, num_workers=1, collate_fn=collate)
    batches = list(loader)
    assert [batch.ids for batch in batches] == [("VOC2007/000001", "VOC2007/000002"), ("VOC2007/000003",)]
    assert torch.equal(batches[1].images, collate([load_sample(records[2])]).images)
