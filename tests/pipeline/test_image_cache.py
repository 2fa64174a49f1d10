"""The cache of decoded images: its pixels are those of decoding, it resumes, it waits, and it is never stale."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import pipeline.image_cache
import pipeline.train
from cache.catalog import read_catalog
from cache.image_arrays import StoredImages
from cache.lock import exclusive
from data.errors import (
    ImageError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreStaleError,
    StoreWriteError,
    UsageError,
)
from data.geometry import VIEWS
from data.images import decode_image, show_view, squash
from data.records import ImageRecord
from data.voc import read_voc
from pipeline.dataset import EpochBatches, LoadedBatch, SampleKey, TrainingImages, collate_loaded
from pipeline.image_cache import ensure_image_store
from pipeline.image_frames import probe_decoder
from pipeline.inspection import closing_lines, inspect_store, inspect_with_progress, summary_table
from pipeline.loading import load_batches
from pipeline.train import train
from tests.pipeline.small_runs import equal, files_of, small_run, stored_targets, weights_of

CPU = torch.device("cpu")
TRAIN = ("2007:train",)
FORKS = pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images in three shards."""
    monkeypatch.setattr("pipeline.image_frames._SHARD_SAMPLES", 4)


@pytest.fixture(scope="module")
def whole(records: list[ImageRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the twelve training images. Shared: read only."""
    store = tmp_path_factory.mktemp("images") / "images.zarr"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.image_frames._SHARD_SAMPLES", 4)
        ensure_image_store(store, records, TRAIN)
    return store


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy.zarr"))


@pytest.fixture
def changed(devkit: Path, tmp_path: Path) -> list[ImageRecord]:
    """The records of a devkit in which one image's file is another one of the same size."""
    root = Path(shutil.copytree(devkit, tmp_path / "VOCdevkit"))
    records = read_voc(root, TRAIN)
    Image.open(records[3].image_path).save(records[3].image_path, quality=50)
    return records


def stop_at(monkeypatch: pytest.MonkeyPatch, image: int, stop: Callable[[], None]) -> None:
    """Do something else instead of decoding the n-th image."""
    count = 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == image:
            stop()
        return decode_image(*arguments)

    monkeypatch.setattr("pipeline.image_frames.decode_image", counted)


def interrupted(monkeypatch: pytest.MonkeyPatch, store: Path, records: list[ImageRecord]) -> None:
    """Make the cache of the records until its sixth image, where Ctrl-C is pressed: one shard of four is whole."""
    with monkeypatch.context() as patched:
        stop_at(patched, 6, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            ensure_image_store(store, records, TRAIN)


def refuse(*_: Any) -> Any:
    raise AssertionError("an image was decoded")


class TestPixels:
    def test_every_view_is_the_one_that_decoding_gives(self, whole: Path, records: list[ImageRecord]) -> None:
        images = TrainingImages(records, images=ensure_image_store(whole, records, TRAIN))
        for index, record in enumerate(records):
            for view in VIEWS:
                found = images.load(SampleKey(index, view, 0)).sample.image
                np.testing.assert_array_equal(found, squash(show_view(decode_image(record), view)))

    @FORKS
    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_are_bit_identical_with_and_without_it(
        self, whole: Path, records: list[ImageRecord], workers: int
    ) -> None:
        batches = EpochBatches(records, 5, 0.5, 0)

        def epoch(**images: Any) -> list[LoadedBatch]:
            loaded = TrainingImages(records, seed=1, jitter_strength=0.3, **images)
            return list(load_batches(loaded.load, batches, collate_loaded, workers=workers, device=CPU))

        plain, cached = epoch(), epoch(images=ensure_image_store(whole, records, TRAIN))
        assert {key.view for loaded in plain for key in loaded.keys} == set(VIEWS)
        for one, other in zip(plain, cached, strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.batch.images, other.batch.images)
            assert (one.batch.ids, one.batch.views, one.batch.image_sizes) == (
                other.batch.ids, other.batch.views, other.batch.image_sizes,
            )  # fmt: skip
            for mine, theirs in zip(one.batch.targets, other.batch.targets, strict=True):
                assert equal(mine, theirs)

    def test_no_image_file_is_opened_while_training_from_it(
        self, whole: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = ensure_image_store(whole, records, TRAIN)
        for name in ("read_image_bytes", "decode_image"):
            monkeypatch.setattr(f"pipeline.dataset.{name}", refuse)
        batches = EpochBatches(records, 4, 0.5, 0)
        loaded = TrainingImages(records, jitter_strength=0.3, images=images)
        assert len(list(load_batches(loaded.load, batches, collate_loaded, workers=0, device=CPU))) == 3

    def test_an_epoch_ends_with_the_same_weights(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = {"jitter": 0.3}
        plain = small_run(devkit, tmp_path, "plain", recipe=recipe)
        train(plain)
        images = ensure_image_store(tmp_path / "images.zarr", read_voc(devkit, TRAIN, plain.limit), TRAIN, plain.limit)

        def with_images(*arguments: Any, **settings: Any) -> TrainingImages:
            return TrainingImages(*arguments, **{**settings, "images": images})

        monkeypatch.setattr(pipeline.train, "TrainingImages", with_images)
        monkeypatch.setattr("pipeline.dataset.decode_image", decode_only_for_scores := _Counter())
        cached = small_run(devkit, tmp_path, "cached", recipe=recipe)
        train(cached)
        assert equal(weights_of(cached), weights_of(plain))
        assert decode_only_for_scores.sets == {"val"}


class _Counter:
    """Decodes, and remembers of which image set each image was: the twelve training images come first."""

    def __init__(self) -> None:
        self.sets: set[str] = set()

    def __call__(self, record: ImageRecord, data: bytes | None = None) -> Image.Image:
        self.sets.add("train" if int(record.id.rpartition("/")[2]) <= 12 else "val")
        return decode_image(record, data)


class TestMaking:
    def test_a_complete_store_is_only_looked_at(
        self, copy: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files_of(copy), copy.stat().st_mtime_ns
        monkeypatch.setattr("pipeline.image_frames.decode_image", refuse)
        with exclusive(copy):  # not even its lock is asked for
            ensure_image_store(copy, records, TRAIN)
        assert (files_of(copy), copy.stat().st_mtime_ns) == before

    @FORKS
    def test_worker_processes_write_the_same_bytes(
        self, whole: Path, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        ensure_image_store(tmp_path / "images.zarr", records, TRAIN, workers=2)
        assert files_of(tmp_path / "images.zarr") == files_of(whole)

    def test_what_was_committed_before_an_error_is_kept(
        self, whole: Path, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "images.zarr"

        def fail() -> None:
            raise ImageError("a damaged image")

        with monkeypatch.context() as patched:
            stop_at(patched, 10, fail)
            with pytest.raises(ImageError, match="a damaged image"):
                ensure_image_store(store, records, TRAIN)
        ledger = (store / "frames/original/images/ledger.jsonl").read_text().splitlines()
        assert [json.loads(line)["shard"] for line in ledger] == [0, 1]
        (note,) = (store / "frames/original/images/provenance.jsonl").read_text().splitlines()
        assert json.loads(note)["samples"] == 8
        with monkeypatch.context() as patched:
            stop_at(patched, 5, lambda: pytest.fail("an image was decoded again"))
            ensure_image_store(store, records, TRAIN)
        assert files_of(store) == files_of(whole)

    @FORKS
    def test_a_killed_run_is_resumed_to_the_same_bytes(
        self, whole: Path, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "images.zarr"
        child = os.fork()
        if child == 0:
            stop_at(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                ensure_image_store(store, records, TRAIN)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert store.exists()
        ensure_image_store(store, records, TRAIN)
        assert files_of(store) == files_of(whole)

    def test_a_full_disk_is_told_before_anything_is_written(
        self, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cache.writer.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_000_000))
        with pytest.raises(StoreWriteError, match=r"needs 8\.294 MB, but .* has 1\.000 MB free") as caught:
            ensure_image_store(tmp_path / "images.zarr", records, TRAIN)
        assert str(caught.value.hint).endswith("give another store: --cache-images STORE")
        assert not (tmp_path / "images.zarr").exists()

    def test_an_image_that_changes_meanwhile_is_refused(
        self, changed: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        last = changed[-1].image_path
        stop_at(monkeypatch, 2, lambda: shutil.copy(changed[0].image_path, last) and None)
        with pytest.raises(ImageError, match=f"{last}: the image changed while the images were being cached"):
            ensure_image_store(tmp_path / "images.zarr", changed, TRAIN)


class TestWaiting:
    def test_a_second_run_says_so_waits_and_uses_what_the_first_one_made(
        self, whole: Path, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        store = tmp_path / "images.zarr"
        looks = []
        with ExitStack() as held:
            held.enter_context(exclusive(store))

            def look_again(_: float) -> None:
                looks.append(store.exists())
                if len(looks) == 3:
                    shutil.copytree(whole, store)
                    held.close()

            monkeypatch.setattr(pipeline.image_cache.time, "sleep", look_again)
            monkeypatch.setattr("pipeline.image_frames.decode_image", refuse)
            images = ensure_image_store(store, records, TRAIN)
        assert looks == [False] * 3
        assert images.read(records[0].id).shape == (480, 480, 3)
        told = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
        assert len(told) == 1
        assert f"{store}: another process is writing this store (pid {os.getpid()} on " in told[0]

    def test_where_the_first_one_dies_the_second_finishes(
        self, whole: Path, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with ExitStack() as held:
            held.enter_context(exclusive(tmp_path / "images.zarr"))
            monkeypatch.setattr(pipeline.image_cache.time, "sleep", lambda _: held.close())
            ensure_image_store(tmp_path / "images.zarr", records, TRAIN)
        assert files_of(tmp_path / "images.zarr") == files_of(whole)


class TestNeverStale:
    def test_a_changed_image_file_is_refused_by_name(self, whole: Path, changed: list[ImageRecord]) -> None:
        with pytest.raises(StoreStaleError) as caught:
            ensure_image_store(whole, changed, TRAIN)
        assert f"dataset.samples[{changed[3].id}].sha256: stored " in caught.value.message
        assert caught.value.message.count("dataset.samples") == 1
        assert caught.value.exit_code == 3
        assert str(caught.value.hint).startswith(f"remove it, the same command makes it anew: rm -r {whole}")

    def test_also_where_the_run_has_fewer_images(self, whole: Path, changed: list[ImageRecord]) -> None:
        ensure_image_store(whole, changed[:3], TRAIN, 3)
        with pytest.raises(StoreStaleError, match=rf"dataset\.samples\[{changed[3].id}\]\.sha256"):
            ensure_image_store(whole, changed[:4], TRAIN, 4)

    def test_other_images_are_refused(self, whole: Path, records: list[ImageRecord], devkit: Path) -> None:
        more = [*records, *read_voc(devkit, ("2007:val",))]
        with pytest.raises(StoreStaleError, match=r"dataset\.samples: stored 2007:train: 12 images, .*: 18 images"):
            ensure_image_store(whole, more, ("2007:train", "2007:val"))

    def test_the_same_images_in_another_order_are_no_others(self, copy: Path, records: list[ImageRecord]) -> None:
        images = ensure_image_store(copy, records[::-1], TRAIN)
        np.testing.assert_array_equal(images.read(records[2].id), squash(decode_image(records[2])))

    def test_they_also_finish_it(
        self, whole: Path, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "images.zarr"
        interrupted(monkeypatch, store, records)
        ensure_image_store(store, records[::-1] + records[:2], TRAIN)
        assert files_of(store) == files_of(whole)

    def test_fewer_images_cannot_finish_a_store(
        self, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "images.zarr"
        interrupted(monkeypatch, store, records)
        ensure_image_store(store, records[:4], TRAIN, 4)
        match = r"2 of the 6 images are not committed, .* on all 12 images"
        with pytest.raises(StoreIncompleteError, match=match) as caught:
            ensure_image_store(store, records[:6], TRAIN, 6)
        assert f"train … --cache-images {store}" in str(caught.value.hint)

    def test_another_frame_is_refused(
        self, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = pipeline.image_cache.image_plan
        with monkeypatch.context() as patched:
            patched.setattr(pipeline.image_cache, "image_plan", lambda *a: replace(plan(*a), frame=(320, 640)))
            ensure_image_store(tmp_path / "images.zarr", records[:2], TRAIN, 2)
        with pytest.raises(StoreStaleError, match=r"frame: stored \[320,640\], found \[480,480\]"):
            ensure_image_store(tmp_path / "images.zarr", records[:2], TRAIN, 2)

    def test_a_library_that_decodes_one_value_otherwise_is_refused(
        self, whole: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def otherwise(*arguments: Any) -> Any:
            frame = squash(*arguments)
            frame[17, 23, 1] ^= 1
            return frame

        monkeypatch.setattr("pipeline.image_frames.squash", otherwise)
        with pytest.raises(
            StoreStaleError, match=r"frames\.probe: Pillow \d.* decodes or resizes a fixed image to other"
        ):
            ensure_image_store(whole, records, TRAIN)

    def test_a_decoder_of_another_name_is_refused_by_field(
        self, whole: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.image_frames.DECODER", "another")
        with pytest.raises(StoreStaleError, match=r"frames\.decoder: stored pillow-rgb, found another"):
            ensure_image_store(whole, records, TRAIN)

    def test_a_teachers_store_is_refused_and_nobody_proposes_to_remove_it(
        self, store: Path, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        with pytest.raises(
            StoreStaleError, match="expected a store of decoded images, found one of teachers"
        ) as caught:
            ensure_image_store(store, records, TRAIN)
        assert "rm" not in str(caught.value.hint).split()
        damaged = Path(shutil.copytree(store, tmp_path / "damaged.zarr"))
        (damaged / "tiny_dino/zarr.json").write_text("{}")
        with pytest.raises(StoreCorruptError) as damage:
            ensure_image_store(damaged, records, TRAIN)
        assert "rm" not in str(damage.value.hint).split()

    def test_a_damaged_shard_is_found_by_whoever_reads_it(self, copy: Path, records: list[ImageRecord]) -> None:
        path = copy / "frames/original/images/c/1/0/0/0"
        with path.open("r+b") as file:
            file.seek(691_204 * 2 + 1000)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        images = ensure_image_store(copy, records, TRAIN)
        images.read(records[5].id)
        with pytest.raises(StoreCorruptError, match=rf"shard 1, sample 6: checksum fails \({records[6].id}\)"):
            images.read(records[6].id)

    def test_the_probe_is_one_of_bits(self) -> None:
        probe = probe_decoder()
        assert (probe.shape, set(probe.tolist())) == ((256,), {-1.0, 1.0})
        np.testing.assert_array_equal(probe, probe_decoder())


class TestTold:
    def test_inspecting_it_speaks_of_no_teacher(self, whole: Path) -> None:
        summary = inspect_store(whole, verify=True)
        out = io.StringIO()
        Console(file=out, width=80).print(summary_table(summary))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert "12×480×480×3" in text
        assert "eacher" not in text
        assert closing_lines(summary) == [
            "", "An image store: decoded images for the student, no teacher's targets.", "",
            f"next: python cli.py train … --cache-images {whole}",
        ]  # fmt: skip

    def test_images_that_changed_are_told_without_a_teacher(self, whole: Path, changed: list[ImageRecord]) -> None:
        root = changed[0].annotation_path.parents[2]
        summary = inspect_with_progress(whole, verify=True, voc_root=root)
        (gap,) = summary["training"]
        assert gap["problem"] == f"1 of 12 image files are not what was decoded ({changed[3].id}: other bytes)"
        assert gap["hint"] == "restore them from the devkit, or give another store (--cache-images)"

    def test_it_is_no_store_of_targets(self, whole: Path, records: list[ImageRecord]) -> None:
        with pytest.raises(UsageError, match="an image store holds decoded images, no teacher's targets"):
            stored_targets(whole, records=records)

    def test_its_size_is_told_when_it_is_made(
        self, records: list[ImageRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = ensure_image_store(tmp_path / "images.h5", records[:3], TRAIN, 3)
        assert isinstance(images, StoredImages)
        told = capsys.readouterr().err
        assert f"caching 3 decoded images in {tmp_path / 'images.h5'}: 0.0 GB" in told
        assert "caching images: 3/3 images" in told
        assert read_catalog(tmp_path / "images.h5").root.dataset.limit == 3
