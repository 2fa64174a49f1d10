from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.errors import StoreStaleError
from data.images import decode_image, image_digest, squash
from data.records import ImageRecord
from features.registry import build_teacher
from pipeline.dataset import EpochBatches, SampleKey, TrainingImages, collate_loaded, plain_batches
from pipeline.image_cache import ensure_image_store
from pipeline.loading import load_batches
from tests.pipeline.small_runs import load

CPU = torch.device("cpu")
# Python 3.12 warns of every fork in a process that has threads, and torch of more workers than cores.
FORKS = pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


def keys_of(records: list[ImageRecord], *, batch_size: int = 4, epoch: int = 0, **draws: Any) -> list[SampleKey]:
    batches = EpochBatches(records, batch_size, **{"flip": 0.5, "seed": 0, **draws})
    batches.epoch = epoch
    return [key for batch in batches for key in batch]


class TestOrderAndViews:
    def test_every_image_is_seen_once_an_epoch(self, records: list[ImageRecord]) -> None:
        batches = EpochBatches(records, 5, 0.5, 0)
        assert [len(batch) for batch in batches] == [5, 5, 2]
        assert len(batches) == 3
        assert sorted(key.index for batch in batches for key in batch) == list(range(12))

    def test_the_batch_size_moves_neither_order_nor_views(self, records: list[ImageRecord]) -> None:
        assert keys_of(records, batch_size=2) == keys_of(records, batch_size=5) == keys_of(records, batch_size=64)

    def test_flipping_does_not_move_the_order(self, records: list[ImageRecord]) -> None:
        orders = [[key.index for key in keys_of(records, flip=flip)] for flip in (0.0, 0.5, 1.0)]
        assert orders[0] == orders[1] == orders[2]

    def test_epochs_and_seeds_differ(self, records: list[ImageRecord]) -> None:
        drawn = [keys_of(records), keys_of(records, epoch=1), keys_of(records, seed=1)]
        assert len({tuple((key.index, key.view) for key in keys) for keys in drawn}) == 3

    def test_a_rarer_flip_flips_some_of_the_same_images(self, records: list[ImageRecord]) -> None:
        rare, often = (
            {
                (epoch, key.index)
                for epoch in range(20)
                for key in keys_of(records, flip=flip, epoch=epoch)
                if key.view == "hflip"
            }
            for flip in (0.3, 0.7)
        )
        assert rare < often
        assert 0.2 < len(rare) / 240 < 0.4
        assert 0.6 < len(often) / 240 < 0.8

    def test_no_flip_and_always_flip_are_exact(self, records: list[ImageRecord]) -> None:
        assert {key.view for key in keys_of(records, flip=0.0)} == {"original"}
        assert {key.view for key in keys_of(records, flip=1.0)} == {"hflip"}

    def test_a_view_belongs_to_the_image_not_to_its_place(self, records: list[ImageRecord]) -> None:
        views = {records[key.index].id: key.view for key in keys_of(records)}
        turned = records[::-1]
        assert {turned[key.index].id: key.view for key in keys_of(turned)} == views

    def test_evaluation_shows_every_image_once_in_order_and_unflipped(self) -> None:
        batches = plain_batches(5, 2)
        assert [[key.index for key in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
        assert {key.view for batch in batches for key in batch} == {"original"}


class TestImages:
    def test_jitter_is_the_images_own(self, records: list[ImageRecord]) -> None:
        """The same in whatever batch, order or process; another in another epoch."""
        images = TrainingImages(records, seed=0, jitter_strength=0.4)
        again = TrainingImages(records[::-1], seed=0, jitter_strength=0.4)
        first = images.load(SampleKey(3, "original", 0)).sample.image
        assert np.array_equal(again.load(SampleKey(8, "original", 0)).sample.image, first)
        assert not np.array_equal(images.load(SampleKey(3, "original", 1)).sample.image, first)
        assert not np.array_equal(TrainingImages(records).load(SampleKey(3, "original", 0)).sample.image, first)

    def test_live_teachers_see_the_view_without_jitter(self, records: list[ImageRecord]) -> None:
        wanted = build_teacher("tiny_dino").input
        loaded = load(records[:2], ["hflip", "original"], jitter_strength=0.4, teacher_inputs=(wanted,))
        mirrored = ImageOps.mirror(Image.open(records[0].image_path).convert("RGB"))
        expected = np.asarray(mirrored.resize((420, 420), Image.Resampling.BICUBIC))
        assert np.array_equal(loaded.teacher_images[wanted][0].numpy(), expected)
        plain = load(records[:2], ["hflip", "original"])
        assert not torch.equal(loaded.batch.images, plain.batch.images)

    def test_boxes_follow_the_view(self, records: list[ImageRecord]) -> None:
        loaded = load([records[0]] * 2, ["original", "hflip"])
        original, mirrored = (target["boxes"] for target in loaded.batch.targets)
        assert torch.allclose(mirrored[:, [0, 2]], 480 - original[:, [2, 0]])
        assert torch.equal(mirrored[:, [1, 3]], original[:, [1, 3]])

    @pytest.mark.filterwarnings(
        "ignore:This process:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
    )
    def test_workers_change_no_pixel(self, records: list[ImageRecord]) -> None:
        images = TrainingImages(records, jitter_strength=0.4)
        batches = EpochBatches(records, 5, 0.5, 0)
        here, there = (
            [
                loaded.batch.images
                for loaded in load_batches(images.load, batches, collate_loaded, workers=workers, device=CPU)
            ]
            for workers in (0, 2)
        )
        assert len(here) == len(there) == 3
        assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))

    @pytest.mark.filterwarnings(
        "ignore:This process:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
    )
    def test_persistent_workers_follow_the_epoch(self, records: list[ImageRecord]) -> None:
        batches = EpochBatches(records[:4], 2, 0.5, 0)
        loader = load_batches(TrainingImages(records).load, batches, collate_loaded, workers=1, device=CPU)
        seen = []
        for epoch in (0, 1):
            batches.epoch = epoch
            seen.append([key for loaded in loader for key in loaded.keys])
        assert seen == [keys_of(records[:4], epoch=0), keys_of(records[:4], epoch=1)]


class TestDigests:
    def test_an_image_the_teachers_did_not_see_is_refused(self, records: list[ImageRecord]) -> None:
        images = TrainingImages(records, digests={records[2].id: "0" * 64})
        with pytest.raises(
            StoreStaleError, match=rf"{records[2].image_path}: the image changed.*expected SHA-256 0000"
        ) as caught:
            images.load(SampleKey(2, "original", 0))
        assert caught.value.exit_code == 3

    def test_every_image_is_compared_once(self, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch) -> None:
        digests = {record.id: image_digest(record.image_path.read_bytes()) for record in records}
        images = TrainingImages(records, digests=digests)
        calls: list[int] = []

        def count(data: bytes) -> str:
            calls.append(len(data))
            return image_digest(data)

        monkeypatch.setattr("pipeline.dataset.image_digest", count)
        for epoch in (0, 1):
            images.load(SampleKey(0, "original", epoch))
        assert len(calls) == 1
        assert records[0].id in digests  # the caller's own dictionary stays whole


class TestCachedImages:
    def test_live_teachers_see_the_original_and_the_student_the_cache(
        self, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        wanted = build_teacher("tiny_dino").input
        images = ensure_image_store(tmp_path / "images.zarr", records[:2], ("2007:train",), 2)
        settings: dict[str, Any] = {"jitter_strength": 0.4, "teacher_inputs": (wanted,)}
        plain = load(records[:2], ["hflip", "original"], **settings)
        cached = load(records[:2], ["hflip", "original"], images=images, **settings)
        assert torch.equal(cached.batch.images, plain.batch.images)
        assert torch.equal(cached.teacher_images[wanted], plain.teacher_images[wanted])

    def test_an_image_that_changed_since_is_refused_where_it_is_still_decoded(
        self, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        copy = replace(records[0], image_path=tmp_path / "image.jpg")
        copy.image_path.write_bytes(records[0].image_path.read_bytes())
        images = ensure_image_store(tmp_path / "images.zarr", [copy], ("2007:train",), 1)
        Image.open(copy.image_path).save(copy.image_path, "JPEG", quality=30)
        loaded = load([copy], ["original"], images=images)
        np.testing.assert_array_equal(loaded.batch.images[0].permute(1, 2, 0), squash(decode_image(records[0])))
        with pytest.raises(StoreStaleError, match=rf"image\.jpg: the image changed since {images.path} saw it"):
            load([copy], ["original"], images=images, teacher_inputs=(build_teacher("tiny_dino").input,))

    def test_what_the_teachers_saw_is_compared_with_what_was_decoded_at_once(
        self, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        images = ensure_image_store(tmp_path / "images.zarr", records[:3], ("2007:train",), 3)
        TrainingImages(records[:3], digests=dict(images.digests), images=images)
        with pytest.raises(
            StoreStaleError, match=rf"{records[2].image_path}: the image changed since the teachers saw"
        ):
            TrainingImages(records[:3], digests={**images.digests, records[2].id: "0" * 64}, images=images)
