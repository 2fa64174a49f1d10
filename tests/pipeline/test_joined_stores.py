"""Stores joined by image id, as training reads them, and known by their fingerprints."""

from pathlib import Path

import numpy as np
import pytest

from cache.reader import TeacherStore
from data.errors import StoreStaleError, UsageError
from data.geometry import View
from data.records import ImageRecord
from data.voc import read_voc
from pipeline.extract import extract
from pipeline.train import train
from tests.pipeline.small_runs import extraction, from_store, load, small_run, stored_targets

ORDER: list[View] = ["hflip", "original", "original", "hflip"]


class TestJoined:
    """Two stores of half of the images each, extracted on their own, and one of the logits' teacher alone."""

    @pytest.fixture(scope="class")
    @staticmethod
    def parts(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        folder = tmp_path_factory.mktemp("parts")
        return [
            extract(extraction(devkit, folder / "train.zarr", teachers=("tiny_dino",))).store,
            extract(extraction(devkit, folder / "val.zarr", voc_sets=("2007:val",), teachers=("tiny_dino",))).store,
            extract(
                extraction(devkit, folder / "clip.zarr", voc_sets=("2007:trainval",), teachers=("tiny_clip",))
            ).store,
        ]

    @pytest.fixture(scope="class")
    @staticmethod
    def everything(devkit: Path) -> list[ImageRecord]:
        return read_voc(devkit, ("2007:val", "2007:train"))

    def test_each_row_comes_from_the_store_that_has_it(self, parts: list[Path], everything: list[ImageRecord]) -> None:
        source = stored_targets(*parts, records=everything)
        chosen = [everything[n] for n in (0, 17, 5, 6)]
        targets = source(load(chosen, ORDER))
        assert targets.features is not None
        assert targets.logits is not None
        for position, (record, view) in enumerate(zip(chosen, ORDER, strict=True)):
            path = next(path for path in parts if record.id in TeacherStore(path).row_of_id)
            opened, clip = TeacherStore(path), TeacherStore(parts[2])
            row = opened.row_of_id[record.id]
            np.testing.assert_array_equal(
                targets.features[position].numpy(), opened.array("tiny_dino", view, "features").read(row)
            )
            np.testing.assert_array_equal(
                targets.logits[position].numpy(),
                clip.array("tiny_clip", view, "logits").read(clip.row_of_id[record.id]),
            )

    def test_a_student_trains_on_them_and_the_record_names_each(
        self, devkit: Path, parts: list[Path], tmp_path: Path
    ) -> None:
        sets = ("2007:val", "2007:train")  # six images of the second store, one of the first
        result = train(
            small_run(devkit, tmp_path, voc_sets=sets, limit=7, distillation=from_store(*parts),
                      recipe={"batch_size": 4}, evaluate="final-only")
        )  # fmt: skip
        assert result["config"]["distillation"]["stores"] == [str(path) for path in parts]
        served = [sorted(said["arrays"]) for said in result["targets"]["stores"]]
        features = ["tiny_dino/hflip/features", "tiny_dino/original/features"]
        assert served == [features, features, ["tiny_clip/hflip/logits", "tiny_clip/original/logits"]]

    def test_statistics_run_over_all_stores(self, parts: list[Path], everything: list[ImageRecord]) -> None:
        found = stored_targets(*parts, records=everything).statistics()
        arrays = [TeacherStore(path).array("tiny_dino", "original", "features") for path in parts[:2]]
        cells = np.concatenate([a.gather(range(a.layout.num_samples)).reshape(-1, 64) for a in arrays]).astype("f8")
        np.testing.assert_allclose(found.mean.numpy(), cells.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.std.numpy(), cells.std(axis=0), rtol=1e-4)

    def test_one_key_for_two_teachers_is_refused_by_its_field(
        self, devkit: Path, parts: list[Path], everything: list[ImageRecord], tmp_path: Path
    ) -> None:
        other = extraction(
            devkit, tmp_path / "o.zarr", voc_sets=("2007:val",), teachers=("tiny_dino",), dtype="float32"
        )
        paths = [parts[0], extract(other).store]
        with pytest.raises(StoreStaleError, match=r"features\.dtype: float16 in .*train\.zarr, float32 in .*o\.zarr"):
            stored_targets(*paths, records=everything, gamma=0)

    def test_candidates_of_all_stores_are_listed(
        self, parts: list[Path], store: Path, records: list[ImageRecord]
    ) -> None:
        with pytest.raises(UsageError, match=r"no teacher in the stores .*train\.zarr, .*val\.zarr has logits"):
            stored_targets(*parts[:2], records=records)


class TestFingerprints:
    def test_the_stores_that_were_meant_are_taken(self, store: Path, store32: Path, records: list[ImageRecord]) -> None:
        one, other = (TeacherStore(path).catalog.fingerprint for path in (store, store32))
        for expected in (one, one[:12], one.upper()):
            assert stored_targets(store, records=records, expect_fingerprints=(expected,)).choice.features
        with pytest.raises(
            StoreStaleError, match=rf"{store32}: expected fingerprint {one[:12]}, found {other}\n  next:"
        ):
            stored_targets(store32, records=records, expect_fingerprints=(one[:12],))
        with pytest.raises(StoreStaleError, match=rf"{store}: expected fingerprint {other}, found {one}") as caught:
            stored_targets(store, store32, records=records, expect_fingerprints=(other, one))
        assert caught.value.exit_code == 3
