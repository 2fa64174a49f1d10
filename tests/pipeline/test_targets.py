import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import features.tiny
from cache.plan import StorePlan
from cache.reader import TeacherStore
from cache.writer import open_writer
from data.errors import (
    StoreCorruptError,
    StoreError,
    StoreIncompleteError,
    StoreMissingError,
    StoreStaleError,
    UsageError,
)
from data.geometry import View
from data.records import ImageRecord
from data.voc import read_voc
from features.teacher import TeacherOutput
from pipeline.config import Distillation
from pipeline.extract import build_teachers, digest_images, extract, teacher_plan
from pipeline.targets import LiveTargets, StoredTargets, choose_teachers, views_drawn
from tests.pipeline.small_runs import TINY_TEACHERS, extraction, from_store, load

CPU = torch.device("cpu")
BOTH: tuple[View, ...] = ("original", "hflip")
ORDER: list[View] = ["hflip", "original", "original", "hflip"]


def stored_targets(
    store: Path, records: list[ImageRecord], views: tuple[View, ...] = BOTH, **weights: Any
) -> StoredTargets:
    return StoredTargets(store, from_store(store, **weights), records, views, CPU)


def live_targets(records: list[ImageRecord], **weights: Any) -> LiveTargets:
    teachers = build_teachers(TINY_TEACHERS, {}, False, CPU)
    return LiveTargets(teachers, Distillation(source="live", teachers=TINY_TEACHERS, **weights), records, CPU)


class TestStored:
    def test_each_row_comes_from_its_image_and_its_view(self, store: Path, records: list[ImageRecord]) -> None:
        chosen = [records[7], records[0], records[3], records[3]]
        targets = stored_targets(store, records)(load(chosen, ORDER))
        opened = TeacherStore(store)
        assert targets.features is not None
        assert targets.logits is not None
        assert targets.features.dtype == torch.float16
        for position, (record, view) in enumerate(zip(chosen, ORDER, strict=True)):
            row = records.index(record)
            for found, (teacher, name) in (
                (targets.features, ("tiny_dino", "features")),
                (targets.logits, ("tiny_clip", "logits")),
            ):
                np.testing.assert_array_equal(found[position].numpy(), opened.array(teacher, view, name).read(row))

    def test_a_loss_without_weight_asks_for_nothing(self, store: Path, records: list[ImageRecord]) -> None:
        source = stored_targets(store, records, beta=0, gamma=0)
        targets = source(load(records[:2], ["original", "hflip"]))
        assert (targets.features, targets.logits, source.feature_shape) == (None, None, None)
        assert source.untrained == ()

    def test_statistics_are_those_of_the_training_images_in_the_original_view(
        self, store: Path, records: list[ImageRecord]
    ) -> None:
        found = stored_targets(store, records[2:7]).statistics()
        cells = TeacherStore(store).array("tiny_dino", "original", "features").gather(range(2, 7)).astype(np.float64)
        cells = cells.reshape(-1, 64)
        np.testing.assert_allclose(found.mean.numpy(), cells.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.std.numpy(), cells.std(axis=0), rtol=1e-4)

    def test_a_channel_that_never_moves_is_left_out_of_the_loss(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = features.tiny.TinyDinoTeacher.forward

        def still(self: features.tiny.TinyDinoTeacher, pixels: Tensor) -> TeacherOutput:
            output = forward(self, pixels)
            assert output.features is not None
            output.features[..., 5] = 0.25
            return output

        monkeypatch.setattr(features.tiny.TinyDinoTeacher, "forward", still)
        store = extract(extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_dino",), limit=2)).store
        std = stored_targets(store, read_voc(devkit, ("2007:train",), 2), gamma=0).statistics().std
        assert torch.isinf(std[5])
        assert torch.isfinite(std).sum() == 63

    def test_the_record_names_every_array_that_is_read(self, store: Path, records: list[ImageRecord]) -> None:
        record = stored_targets(store, records, ("original",)).record()
        assert set(record["arrays"]) == {"tiny_dino/original/features", "tiny_clip/original/logits"}
        assert record["untrained"] == ["tiny_dino", "tiny_clip"]
        fingerprints = TeacherStore(store).catalog.fingerprints
        for path, said in record["arrays"].items():
            assert said["fingerprint"] == fingerprints[path]

    def test_digests_are_those_of_the_training_images(self, store: Path, records: list[ImageRecord]) -> None:
        digests = stored_targets(store, records[:3]).digests
        assert digests == {entry.id: entry.sha256 for entry in digest_images(records[:3])}


class TestLive:
    def test_live_targets_are_the_stored_ones_before_rounding(self, store32: Path, records: list[ImageRecord]) -> None:
        live = live_targets(records)
        loaded = load(records[:4], ORDER, jitter_strength=0.3, teacher_inputs=live.teacher_inputs)
        said, stored = live(loaded), stored_targets(store32, records)(loaded)
        assert said.features is not None
        assert stored.features is not None
        torch.testing.assert_close(said.features, stored.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(said.logits, stored.logits, rtol=1e-5, atol=1e-4)

    def test_statistics_are_the_stores(self, store32: Path, records: list[ImageRecord]) -> None:
        live, stored = live_targets(records).statistics(), stored_targets(store32, records).statistics()
        torch.testing.assert_close(live.mean, stored.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(live.std, stored.std, rtol=1e-4, atol=1e-5)

    def test_the_record_says_that_they_are_untrained(self, records: list[ImageRecord]) -> None:
        record = live_targets(records, gamma=0).record()
        assert record["teachers"] == {"features": "tiny_dino", "logits": None}
        assert record["untrained"] == ["tiny_dino"]


OUTPUTS = {"dino": {"features"}, "clip": {"logits", "embeddings"}, "both": {"features", "logits"}}


class TestChoice:
    def choose(self, keys: tuple[str, ...], **settings: Any) -> tuple[str | None, str | None]:
        chosen = choose_teachers(Distillation(**settings), {key: OUTPUTS[key] for key in keys}, "the store s.zarr")
        return chosen.features, chosen.logits

    @pytest.mark.parametrize(
        ("keys", "settings", "expected"),
        [
            (("dino", "clip"), {}, ("dino", "clip")),
            (("both",), {}, ("both", "both")),
            (("dino",), {"gamma": 0}, ("dino", None)),
            (("clip",), {"beta": 0}, (None, "clip")),
            (("dino", "clip", "both"), {"feature_teacher": "both", "logit_teacher": "clip"}, ("both", "clip")),
            (("dino", "clip", "both"), {"beta": 0, "gamma": 0}, (None, None)),
        ],
        ids=str,
    )
    def test_the_only_or_the_named_one_is_taken(
        self, keys: tuple[str, ...], settings: dict[str, Any], expected: tuple[str | None, str | None]
    ) -> None:
        assert self.choose(keys, **settings) == expected

    @pytest.mark.parametrize(
        ("keys", "settings", "message"),
        [
            (("dino", "both", "clip"), {}, "have features: dino, both\n  next: choose: --feature-teacher NAME"),
            (("dino", "both", "clip"), {"beta": 0}, "have logits: both, clip\n  next: choose: --logit-teacher NAME"),
            (("clip",), {}, "no teacher in the store s.zarr has features.*clip.*\n.*--beta 0"),
            (("dino",), {}, "no teacher in the store s.zarr has logits.*dino.*\n.*--gamma 0"),
            (("dino", "clip"), {"feature_teacher": "clip"}, "--feature-teacher clip: .*teachers with features: dino"),
            (("dino", "clip"), {"logit_teacher": "nope"}, "--logit-teacher nope: .*teachers with logits: clip"),
        ],
        ids=str,
    )
    def test_an_open_choice_is_refused_with_the_candidates(
        self, keys: tuple[str, ...], settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            self.choose(keys, **settings)
        assert caught.value.exit_code == 2

    def test_both_views_are_drawn_as_soon_as_anything_is_flipped(self) -> None:
        assert views_drawn(0.0) == ("original",)
        assert views_drawn(0.1) == views_drawn(1.0) == BOTH


class TestRefusals:
    """A store that cannot serve the run says so before the first step, with what to do."""

    def test_no_store(self, records: list[ImageRecord], tmp_path: Path, store: Path) -> None:
        shutil.copytree(store, tmp_path / "teachers.zarr")
        with pytest.raises(
            StoreMissingError, match=r"teacher\.zarr does not exist; stores beside it: .*teachers\.zarr"
        ):
            stored_targets(tmp_path / "teacher.zarr", records)

    def test_images_that_are_not_in_the_store(self, devkit: Path, store: Path) -> None:
        others = read_voc(devkit, ("2007:trainval",))
        message = (
            r"6 of 18 training images are not in the store \(VOC2007/000013, .*… 1 more\); it holds 12 .*2007:train"
        )
        with pytest.raises(StoreIncompleteError, match=message):
            stored_targets(store, others)

    def test_a_view_that_is_not_in_the_store(self, devkit: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", views=("original",))).store
        with pytest.raises(StoreIncompleteError, match=r"tiny_dino: view 'hflip'.*\n.*--view hflip"):
            stored_targets(store, records)
        assert stored_targets(store, records, ("original",)).feature_shape == (30, 30, 64)

    @pytest.mark.parametrize(
        "array", ["tiny_dino/hflip/features", "tiny_dino/original/moments", "tiny_clip/hflip/logits"]
    )
    def test_shards_that_are_not_committed(
        self, store: Path, tmp_path: Path, records: list[ImageRecord], array: str
    ) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        ledger = copy / array / "ledger.jsonl"
        ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
        message = rf"{array}: 4 of 12 training images are not committed \(VOC2007/000009, .*\)\n  next: .*it resumes"
        with pytest.raises(StoreIncompleteError, match=message):
            stored_targets(copy, records)
        # Eight images are there, and eight images can be trained on.
        assert stored_targets(copy, records[:8]).feature_shape == (30, 30, 64)

    def test_another_frame(self, devkit: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
        teachers = build_teachers(TINY_TEACHERS, {}, False, CPU)
        plan = StorePlan(
            sets=("2007:train",), limit=None, samples=digest_images(records), views=BOTH, feature_dtype="float16",
            teachers=[teacher_plan(key, teacher) for key, teacher in teachers.items()],
            shard_samples=4, batch_size=3, frame=(512, 512),
        )  # fmt: skip
        with open_writer(tmp_path / "s.zarr", plan):
            pass
        with pytest.raises(StoreStaleError, match=r"expected frame \(480, 480\), found \(512, 512\)"):
            stored_targets(tmp_path / "s.zarr", records)

    def test_damage_is_met_at_the_first_touch(self, store: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        shard = next((copy / "tiny_dino/original/features/c/1").rglob("0/0/0"))
        damaged = bytearray(shard.read_bytes())
        damaged[100] ^= 1
        shard.write_bytes(bytes(damaged))
        source = stored_targets(copy, records)
        source(load(records[:1], ["original"]))
        with pytest.raises(StoreCorruptError, match="checksum"):
            source(load(records[4:5], ["original"]))

    @pytest.mark.parametrize("kind", [StoreMissingError, StoreIncompleteError, StoreStaleError, StoreCorruptError])
    def test_each_of_them_ends_with_exit_code_3(self, kind: Callable[[str], StoreError]) -> None:
        assert kind("x").exit_code == 3
