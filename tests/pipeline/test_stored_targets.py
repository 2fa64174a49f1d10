"""Targets read from a store: as they are stored, in whatever dtype, and what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import features.tiny
from cache.int8 import dequantise, quantise
from cache.plan import StorePlan
from cache.reader import TeacherStore, read_features
from cache.writer import open_writer
from data.errors import StoreCorruptError, StoreError, StoreIncompleteError, StoreMissingError, StoreStaleError
from data.geometry import View
from data.records import ImageRecord
from data.voc import read_voc
from features.teacher import TeacherOutput
from pipeline.convert import ConvertConfig, convert
from pipeline.extract import digest_images, extract, teacher_plan
from pipeline.stored_targets import decode_features
from pipeline.teachers import TeacherChoices, build_teachers
from pipeline.train import train
from tests.pipeline.small_runs import TINY_TEACHERS, extraction, from_store, load, small_run, stored_targets

CPU = torch.device("cpu")
BOTH: tuple[View, ...] = ("original", "hflip")
ORDER: list[View] = ["hflip", "original", "original", "hflip"]


@pytest.fixture(scope="module")
def store8(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images' targets, features as int8."""
    return extract(extraction(devkit, tmp_path_factory.mktemp("int8") / "s.zarr", dtype="int8")).store


@pytest.fixture(scope="module")
def store_pca(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The half-precision store on eight components."""
    out = tmp_path_factory.mktemp("pca") / "s.zarr"
    convert(ConvertConfig(source=store, out=out, pca=8))
    return out


class TestStored:
    def test_each_row_comes_from_its_image_and_its_view(self, store: Path, records: list[ImageRecord]) -> None:
        chosen = [records[7], records[0], records[3], records[3]]
        targets = stored_targets(store, records=records)(load(chosen, ORDER))
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
        source = stored_targets(store, records=records, beta=0, gamma=0)
        targets = source(load(records[:2], ["original", "hflip"]))
        assert (targets.features, targets.logits, source.feature_shape) == (None, None, None)
        assert source.untrained == ()

    def test_statistics_are_those_of_the_training_images_in_the_original_view(
        self, store: Path, records: list[ImageRecord]
    ) -> None:
        found = stored_targets(store, records=records[2:7]).statistics()
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
        std = stored_targets(store, records=read_voc(devkit, ("2007:train",), 2), gamma=0).statistics().std
        assert torch.isinf(std[5])
        assert torch.isfinite(std).sum() == 63

    def test_the_record_names_every_array_that_is_read(self, store: Path, records: list[ImageRecord]) -> None:
        record = stored_targets(store, records=records, views=("original",)).record()
        assert record["untrained"] == ["tiny_dino", "tiny_clip"]
        opened = TeacherStore(store)
        assert record["identities"] == {
            key: opened.catalog.teachers[key].manifest.identity for key in ("tiny_dino", "tiny_clip")
        }
        (said,) = record["stores"]
        assert (said["store"], said["fingerprint"]) == (str(store), opened.catalog.fingerprint)
        assert set(said["arrays"]) == {"tiny_dino/original/features", "tiny_clip/original/logits"}
        for path, array in said["arrays"].items():
            assert array["fingerprint"] == opened.catalog.fingerprints[path]
            # The ledger is the only one of a finished array, and sorted: the digest over it is that of its file.
            assert array["content"] == sha256((store / path / "ledger.jsonl").read_bytes()).hexdigest()
        assert said["arrays"]["tiny_dino/original/features"]["sample_shape"] == [30, 30, 64]

    def test_digests_are_those_of_the_training_images(self, store: Path, records: list[ImageRecord]) -> None:
        digests = stored_targets(store, records=records[:3]).digests
        assert digests == {entry.id: entry.sha256 for entry in digest_images(records[:3])}


class TestDtypes:
    """Students train on whatever a store holds: floats, int8 with scales, components of a PCA."""

    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 30, 30, 64), (3, 1, 1, 1)], ids=str)
    def test_the_devices_int8_is_numpys_bit_by_bit(self, shape: tuple[int, ...]) -> None:
        said = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        said[0, 0, 0] *= 1e20
        said[0, -1, -1] = 0
        said[..., -1] *= 1e-30
        stored = quantise(said)._asdict()
        found = decode_features({name: torch.from_numpy(values) for name, values in stored.items()})
        assert found.dtype == torch.float32
        assert found.numpy().tobytes() == dequantise(**stored).tobytes()

    def test_int8_features_are_decoded_to_what_every_reader_gets(
        self, store8: Path, records: list[ImageRecord]
    ) -> None:
        targets = stored_targets(store8, records=records)(load(records[:4], ORDER))
        assert targets.features is not None
        assert targets.features.dtype == torch.float32
        for row, view in enumerate(ORDER):
            np.testing.assert_array_equal(
                targets.features[row].numpy(), read_features(TeacherStore(store8), "tiny_dino", view, row)
            )

    def test_int8_is_close_to_what_was_quantised(self, store8: Path, store32: Path, records: list[ImageRecord]) -> None:
        loaded = load(records[:4], ORDER)
        one, other = (stored_targets(store, records=records)(loaded).features for store in (store8, store32))
        assert one is not None
        assert other is not None
        assert torch.cosine_similarity(one, other, dim=-1).min() > 0.999

    def test_a_pca_store_is_read_with_one_scale(self, store_pca: Path, store: Path, records: list[ImageRecord]) -> None:
        source = stored_targets(store_pca, records=records)
        assert source.feature_shape == (30, 30, 8)
        found = source.statistics()
        cells = TeacherStore(store_pca).array("tiny_dino", "original", "features").gather(range(12)).astype(np.float64)
        cells = cells.reshape(-1, 8)
        np.testing.assert_allclose(found.mean.numpy(), cells.mean(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.std.numpy(), np.full(8, np.sqrt(cells.var(axis=0).mean())), rtol=1e-4)

    @pytest.mark.slow
    def test_a_student_trains_on_each_of_them(
        self, devkit: Path, store: Path, store8: Path, store_pca: Path, tmp_path: Path
    ) -> None:
        results = {
            path: train(small_run(devkit, tmp_path, str(number), distillation=from_store(path), evaluate="final-only"))
            for number, path in enumerate((store, store8, store_pca))
        }
        losses = {path: result["last"]["losses"] for path, result in results.items()}
        assert losses[store8]["feature"] == pytest.approx(losses[store]["feature"], rel=1e-3)
        assert losses[store_pca]["feature"] > 0
        for path, said in ((store8, "int8"), (store_pca, "float16")):
            arrays = results[path]["targets"]["stores"][0]["arrays"]
            assert arrays["tiny_dino/hflip/features"]["dtype"] == said

    def test_another_grid_is_met_by_resampling_the_students_map(
        self, devkit: Path, tmp_path: Path, records: list[ImageRecord]
    ) -> None:
        """Coarser by area, finer by interpolation: the adapter's rule. Nothing is refused, and the grid is recorded."""
        for grid in ((15, 10), (37, 40)):
            path = tmp_path / f"{grid[0]}.zarr"
            teachers = build_teachers(("tiny_dino",), TeacherChoices(), CPU)
            plan = teacher_plan("tiny_dino", teachers["tiny_dino"])
            outputs = {"features": (*grid, 64)}
            store_plan = StorePlan(
                sets=("2007:train",), limit=None, samples=digest_images(records[:4]), views=BOTH,
                feature_dtype="float16", teachers=[replace(plan, outputs=outputs)], shard_samples=4, batch_size=3,
            )  # fmt: skip
            with open_writer(path, store_plan) as writer:
                for missing in writer.missing():
                    shape = (missing.count, *outputs["features"])
                    writer.commit(missing, {"features": np.random.default_rng(0).normal(size=shape).astype("f4")})
            config = small_run(devkit, tmp_path, path.stem, distillation=from_store(path, gamma=0), limit=2)
            result = train(config)
            assert result["last"]["losses"]["feature"] > 0
            array = result["targets"]["stores"][0]["arrays"]["tiny_dino/original/features"]
            assert array["sample_shape"] == [*grid, 64]


class TestRefusals:
    """A store that cannot serve the run says so before the first step, with what to do."""

    def test_no_store(self, records: list[ImageRecord], tmp_path: Path, store: Path) -> None:
        shutil.copytree(store, tmp_path / "teachers.zarr")
        with pytest.raises(
            StoreMissingError, match=r"teacher\.zarr does not exist; stores beside it: .*teachers\.zarr"
        ):
            stored_targets(tmp_path / "teacher.zarr", records=records)

    def test_images_that_are_not_in_the_store(self, devkit: Path, store: Path) -> None:
        others = read_voc(devkit, ("2007:trainval",))
        message = (
            r"6 of 18 training images are not in the store .*half\.zarr \(VOC2007/000013, .*… 1 more\);"
            r" it holds 12 images of 2007:train"
        )
        with pytest.raises(StoreIncompleteError, match=message):
            stored_targets(store, records=others)

    def test_a_view_that_is_not_in_the_store(self, devkit: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", views=("original",))).store
        with pytest.raises(StoreIncompleteError, match=r"tiny_dino: view 'hflip'.*\n.*--view hflip"):
            stored_targets(store, records=records)
        assert stored_targets(store, records=records, views=("original",)).feature_shape == (30, 30, 64)

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
            stored_targets(copy, records=records)
        # Eight images are there, and eight images can be trained on.
        assert stored_targets(copy, records=records[:8]).feature_shape == (30, 30, 64)

    def test_another_frame(self, devkit: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
        teachers = build_teachers(TINY_TEACHERS, TeacherChoices(), CPU)
        plan = StorePlan(
            sets=("2007:train",), limit=None, samples=digest_images(records), views=BOTH, feature_dtype="float16",
            teachers=[teacher_plan(key, teacher) for key, teacher in teachers.items()],
            shard_samples=4, batch_size=3, frame=(512, 512),
        )  # fmt: skip
        with open_writer(tmp_path / "s.zarr", plan):
            pass
        with pytest.raises(StoreStaleError, match=r"expected frame \(480, 480\), found \(512, 512\)"):
            stored_targets(tmp_path / "s.zarr", records=records)

    def test_damage_is_met_at_the_first_touch(self, store: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        shard = next((copy / "tiny_dino/original/features/c/1").rglob("0/0/0"))
        damaged = bytearray(shard.read_bytes())
        damaged[100] ^= 1
        shard.write_bytes(bytes(damaged))
        source = stored_targets(copy, records=records)
        source(load(records[:1], ["original"]))
        with pytest.raises(StoreCorruptError, match="checksum"):
            source(load(records[4:5], ["original"]))

    @pytest.mark.parametrize("kind", [StoreMissingError, StoreIncompleteError, StoreStaleError, StoreCorruptError])
    def test_each_of_them_ends_with_exit_code_3(self, kind: Callable[[str], StoreError]) -> None:
        assert kind("x").exit_code == 3
