"""Stores joined by image id: what is read, what is refused, and the statistics of what was joined."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cache.int8 import dequantise, quantise
from cache.manifest import PcaManifest
from cache.plan import Derivation, StorePlan, TeacherPlan, constant_digest
from cache.reader import TeacherStore
from cache.samples import SampleEntry
from cache.selection import Selection
from cache.writer import open_writer
from data.errors import StoreCorruptError, StoreError, StoreIncompleteError, StoreStaleError
from data.geometry import VIEWS, View

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

Build = Callable[..., Path]
BOTH: list[View] = ["hflip", "original", "original", "hflip"]


def ids_of(numbers: Sequence[int]) -> list[str]:
    return [f"VOC2007/{number + 1:06d}" for number in numbers]


@pytest.fixture
def build(stores: TinyStores) -> Build:
    """Builds a store of some of twenty numbered images. What a teacher says follows from the image, not its row."""

    def of(name: str, numbers: Sequence[int], *, limit: int | None = None, **changes: Any) -> Path:
        every = stores.samples(20)
        plan = stores.plan(**{"samples": [every[number] for number in numbers], **changes})
        with open_writer(stores.folder / name, plan) as writer:
            for missing in writer.missing()[:limit]:
                own = dataclasses.replace(missing, first=0, count=20)
                rows = list(numbers[missing.first : missing.first + missing.count])
                writer.commit(missing, {name: values[rows] for name, values in stores.outputs(own).items()})
        return stores.folder / name

    return of


def selected(paths: Sequence[Path], numbers: Sequence[int]) -> Selection:
    return Selection([TeacherStore(path) for path in paths], ids_of(numbers))


class TestOneStore:
    def test_images_are_addressed_by_their_position(self, build: Build, stores: TinyStores) -> None:
        selection = selected([build("a.zarr", range(7))], [5, 2, 6])
        features = selection.arrays("dino", "features", VIEWS)["features"]
        found = features.gather([2, 0, 1, 2], BOTH)
        expected = [stores.values("dino", view, "features", [n])[0] for n, view in zip([6, 5, 2, 6], BOTH, strict=True)]
        np.testing.assert_array_equal(found, np.stack(expected).astype("<f2"))
        assert (features.sample_shape, features.dtype, features.num_images) == ((3, 2, 5), np.dtype("<f2"), 3)
        assert features.num_bytes == 3 * 2 * 60

    def test_a_buffer_is_filled_and_one_of_another_shape_refused(self, build: Build) -> None:
        logits = selected([build("a.zarr", range(7))], range(7)).arrays("clip", "logits", VIEWS)["logits"]
        out = np.empty((2, 4), dtype="<f4")
        assert logits.gather([4, 1], ["original", "hflip"], out=out) is out
        np.testing.assert_array_equal(out, logits.gather([4, 1], ["original", "hflip"]))
        with pytest.raises(ValueError, match=r"expected out of shape \(1, 4\), found \(2, 4\)"):
            logits.gather([4], ["original"], out=out)
        with pytest.raises(ValueError, match="shorter"):
            logits.gather([4, 1], ["original"])

    def test_prefetching_changes_nothing(self, build: Build) -> None:
        path = build("a.zarr", range(7))
        plain, asked = (selected([path], range(7)).arrays("dino", "features", VIEWS)["features"] for _ in range(2))
        asked.prefetch([0, 3, 6, 0], BOTH)
        np.testing.assert_array_equal(asked.gather([0, 3, 6, 0], BOTH), plain.gather([0, 3, 6, 0], BOTH))

    def test_only_shards_with_images_of_the_run_are_named(self, build: Build) -> None:
        features = selected([build("a.zarr", range(7))], [6, 1, 0]).arrays("dino", "features", VIEWS)["features"]
        found = [(reader.layout.path, shard) for reader, shard in features.shards()]
        assert found == [(f"dino/{view}/features", shard) for view in VIEWS for shard in (0, 2)]

    def test_int8_features_come_with_their_scales(self, build: Build, stores: TinyStores) -> None:
        path = build("a.zarr", range(4), teachers=["dino"], feature_dtype="int8")
        arrays = selected([path], [3, 1]).arrays("dino", "features", VIEWS)
        assert list(arrays) == ["features", "scale_channel", "scale_token"]
        views: list[View] = ["hflip", "original"]
        found = {name: array.gather([0, 1], views) for name, array in arrays.items()}
        for position, (number, view) in enumerate(zip([3, 1], views, strict=True)):
            said = quantise(stores.values("dino", view, "features", [number]))
            for name, values in said._asdict().items():
                np.testing.assert_array_equal(found[name][position], values[0])
        assert dequantise(**found).shape == (2, 3, 2, 5)


class TestJoined:
    def test_images_of_one_teacher_may_lie_in_two_stores(self, build: Build, stores: TinyStores) -> None:
        paths = [build("a.zarr", [0, 2, 4, 6]), build("b.zarr", [1, 3, 5], shard_samples=2)]
        whole = selected([build("c.zarr", range(7))], range(7))
        joined = selected(paths, range(7))
        for teacher, name in (("dino", "features"), ("clip", "logits")):
            one = joined.arrays(teacher, name, VIEWS)[name]
            other = whole.arrays(teacher, name, VIEWS)[name]
            for view in VIEWS:
                np.testing.assert_array_equal(one.gather(range(7), [view] * 7), other.gather(range(7), [view] * 7))

    def test_teachers_may_lie_in_two_stores(self, build: Build, stores: TinyStores) -> None:
        paths = [build("a.zarr", range(7), teachers=["dino"]), build("b.zarr", [6, 5, 4], teachers=["clip"])]
        joined = selected(paths, [5, 4])
        assert joined.outputs == {"dino": {"features", "moments"}, "clip": {"logits", "embeddings"}}
        np.testing.assert_array_equal(
            joined.arrays("clip", "logits", ["hflip"])["logits"].gather([1, 0], ["hflip"] * 2),
            stores.values("clip", "hflip", "logits", [4, 5]),
        )
        features = joined.arrays("dino", "features", ["hflip"])["features"].gather([1], ["hflip"])
        np.testing.assert_array_equal(features, stores.values("dino", "hflip", "features", [4]).astype("<f2"))

    def test_views_of_one_teacher_may_lie_in_two_stores(self, build: Build, stores: TinyStores) -> None:
        paths = [build(f"{view}.zarr", range(4), views=[view]) for view in VIEWS]
        found = selected(paths, range(4)).arrays("clip", "logits", VIEWS)["logits"].gather([3, 3], VIEWS)
        np.testing.assert_array_equal(found, [stores.values("clip", view, "logits", [3])[0] for view in VIEWS])

    def test_a_zarr_and_an_hdf5_store_may_be_joined(self, build: Build, stores: TinyStores) -> None:
        paths = [build("a.zarr", [0, 1, 2]), build("b.h5", [3, 4, 5, 6], format="hdf5")]
        found = selected(paths, range(7)).arrays("dino", "features", VIEWS)["features"]
        expected = stores.values("dino", "hflip", "features", range(7)).astype("<f2")
        np.testing.assert_array_equal(found.gather(range(7), ["hflip"] * 7), expected)

    def test_the_first_store_serves_what_both_hold(self, build: Build) -> None:
        first, second = build("a.zarr", [0, 1, 2]), build("b.zarr", [2, 3])
        for order, expected in (([first, second], [0, 0, 0, 1]), ([second, first], [1, 1, 0, 0])):
            places = selected(order, range(4)).arrays("dino", "features", ["original"])["features"].places["original"]
            assert places.reader.tolist() == expected

    def test_statistics_of_the_parts_are_those_of_the_whole(self, build: Build) -> None:
        joined = selected([build("a.zarr", [0, 2, 4, 6]), build("b.zarr", [1, 3, 5])], range(7))
        whole = selected([build("c.zarr", range(7))], range(7))
        for one, other in zip(joined.channel_statistics("dino"), whole.channel_statistics("dino"), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_digests_are_those_of_the_runs_images(self, build: Build, stores: TinyStores) -> None:
        joined = selected([build("a.zarr", [0, 1, 2]), build("b.zarr", [2, 3])], [3, 1])
        every = stores.samples(20)
        assert joined.digests == {every[n].id: every[n].sha256 for n in (3, 1)}

    def test_the_record_says_what_each_store_serves(self, build: Build) -> None:
        paths = [build("a.zarr", [0, 1, 2]), build("b.zarr", [2, 3]), build("c.zarr", [0])]
        joined = selected(paths, range(4))
        record = joined.record(joined.arrays("dino", "features", VIEWS).values())
        json.dumps(record)
        assert [said["store"] for said in record] == [str(path) for path in paths]
        for path, said in zip(paths, record, strict=True):
            catalog = TeacherStore(path).catalog
            assert said["fingerprint"] == catalog.fingerprint
            assert set(said["arrays"]) == (
                {"dino/original/features", "dino/hflip/features"} if path != paths[2] else set()
            )
            for name, array in said["arrays"].items():
                ledger = (path / name / "ledger.jsonl").read_bytes()
                assert array == {
                    "fingerprint": catalog.fingerprints[name],
                    "content": sha256(ledger).hexdigest(),
                    "sample_shape": [3, 2, 5],
                    "dtype": "float16",
                }


class TestStatistics:
    @pytest.mark.parametrize("numbers", [range(7), [5, 0, 3], [2]])
    def test_they_are_those_of_the_runs_images_in_the_original_view(
        self, build: Build, stores: TinyStores, numbers: Sequence[int]
    ) -> None:
        cells = stores.values("dino", "original", "features", numbers).astype("<f2").astype(np.float64).reshape(-1, 5)
        mean, std = selected([build("a.zarr", range(7))], numbers).channel_statistics("dino")
        assert mean.dtype == std.dtype == np.float32
        np.testing.assert_allclose(mean, cells.mean(axis=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(std, cells.std(axis=0), rtol=1e-6)

    def test_more_images_than_are_summed_at_once(
        self, build: Build, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        selection = selected([build("a.zarr", range(7))], range(7))
        at_once = selection.channel_statistics("dino")
        monkeypatch.setattr("cache.selection._MOMENTS_AT_ONCE", 3)
        for one, other in zip(selection.channel_statistics("dino"), at_once, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)

    def test_a_pca_basis_has_one_scale_since_one_for_each_channel_would_whiten_it(
        self, build: Build, stores: TinyStores
    ) -> None:
        path = build("pca.zarr", range(7), teachers=[projected(stores)])
        mean, scale = selected([path], range(7)).channel_statistics("dino")
        cells = stores.values("dino", "original", "features", range(7)).astype("<f2").astype(np.float64).reshape(-1, 5)
        np.testing.assert_allclose(mean, cells.mean(axis=0), rtol=1e-6, atol=1e-7)
        # Total variance over the number of channels: the mean square of what is left is one, each channel's is not.
        expected = np.sqrt(((cells - cells.mean(axis=0)) ** 2).sum() / cells.size)
        assert scale.shape == (5,)
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        assert np.ptp(cells.std(axis=0)) > 0.05


def projected(stores: TinyStores, seed: int = 0) -> TeacherPlan:
    basis = np.random.default_rng(seed).normal(size=(6, 9)).astype(np.float32)
    manifest = PcaManifest(
        shape=(6, 9), sha256=constant_digest(basis), fit_samples=7, fit_samples_sha256="0" * 64, explained_variance=0.5
    )
    return stores.teacher("dino", derivation=Derivation({}, manifest, basis))


IDENTITY = {"spec": "dino", "input_size": [420, 420], "normalisation": {"mean": [0.485, 0.456, 0.406]}}
OTHER_LAYER = {**IDENTITY, "layer": -2}
OTHER_MEAN = {**IDENTITY, "normalisation": {"mean": [0.5, 0.5, 0.5]}}


class TestRefusals:
    """Every refusal names the field, both stores and both values, or how many images, which ones and the next step."""

    @pytest.mark.parametrize(
        ("one", "other", "message"),
        [
            ({}, {"identity": OTHER_LAYER}, r"  identity\.layer: null in .*a\.zarr, -2 in .*b\.zarr"),
            (
                {},
                {"identity": OTHER_MEAN},
                r"  identity\.normalisation\.mean: \[0\.485,.*\] in .*a\.zarr, \[0\.5,0\.5,0\.5\] in .*b\.zarr",
            ),
            ({}, {"untrained": False}, r"  untrained: true in .*a\.zarr, false in .*b\.zarr"),
            (
                {},
                {"outputs": {"features": (3, 2, 4)}},
                r"  features\.sample_shape: \[3,2,5\] in .*a\.zarr, \[3,2,4\] in .*b\.zarr",
            ),
            (
                {"feature_dtype": "float32"},
                {"feature_dtype": "int8"},
                r"  features\.dtype: float32 in .*a\.zarr, int8 in .*b\.zarr",
            ),
        ],
        ids=["a field", "a nested field", "untrained", "shape", "dtype"],
    )
    def test_one_key_for_two_teachers(
        self, stores: TinyStores, one: dict[str, Any], other: dict[str, Any], message: str
    ) -> None:
        paths = []
        for name, changes in (("a.zarr", one), ("b.zarr", other)):
            plan = stores.plan(4, teachers=[stores.teacher("dino", **changes)])
            with open_writer(stores.folder / name, plan):
                paths.append(stores.folder / name)
        with pytest.raises(StoreStaleError, match=message) as caught:
            selected(paths, range(4)).arrays("dino", "features", VIEWS)
        assert caught.value.message.startswith(f"teacher dino is not the same in {paths[0]} and {paths[1]}:\n")
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize("seeds", [(0, None), (None, 0), (0, 1)], ids=["only one", "only the other", "two bases"])
    def test_another_pca_basis(self, stores: TinyStores, seeds: tuple[int | None, int | None]) -> None:
        paths = []
        for name, seed in zip("ab", seeds, strict=True):
            teacher = stores.teacher("dino") if seed is None else projected(stores, seed)
            paths.append(stores.build(stores.plan(4, teachers=[teacher]), f"{name}.zarr"))
        with pytest.raises(StoreStaleError, match=r"\n  pca(\.sha256)?: .* in .*a\.zarr, .* in .*b\.zarr"):
            selected(paths, range(4)).arrays("dino", "features", VIEWS)

    def test_two_views_that_are_stored_differently(self, stores: TinyStores) -> None:
        paths = [
            stores.build(stores.plan(4, teachers=["dino"], views=[view], feature_dtype=dtype), f"{view}.zarr")
            for view, dtype in (("original", "float16"), ("hflip", "float32"))
        ]
        with pytest.raises(StoreStaleError, match=r"features\.dtype: float16 in .*original\.zarr, float32 in .*hflip"):
            selected(paths, range(4)).arrays("dino", "features", VIEWS)

    def test_a_teacher_that_is_not_read_may_be_another_one(self, stores: TinyStores) -> None:
        stores.build(stores.plan(4), "a.zarr")
        plan = stores.plan(4, teachers=[stores.teacher("dino", identity=OTHER_LAYER)])
        paths = [stores.folder / "a.zarr", stores.build(plan, "b.zarr")]
        assert selected(paths, range(4)).arrays("clip", "logits", VIEWS)["logits"].num_images == 4

    def test_two_images_under_one_id(self, build: Build, stores: TinyStores) -> None:
        changed = [*stores.samples(3)[:2], SampleEntry("VOC2007/000003", 303, 403, "f" * 64)]
        paths = [build("a.zarr", range(3)), stores.build(stores.plan(samples=changed), "b.zarr")]
        message = (
            r"a\.zarr and .*b\.zarr saw different images under one id \(1\):\n"
            rf"  VOC2007/000003\.sha256: {stores.samples(3)[2].sha256} in .*a\.zarr, {'f' * 64} in .*b\.zarr"
        )
        with pytest.raises(StoreStaleError, match=message):
            selected(paths, range(3))
        # An image that the run does not use is not compared.
        assert selected(paths, range(2)).ids == ("VOC2007/000001", "VOC2007/000002")

    def test_another_frame(self, stores: TinyStores) -> None:
        path = stores.build(stores.plan(3, frame=(512, 512)))
        with pytest.raises(StoreStaleError, match=rf"{path}: expected frame \(480, 480\), found \(512, 512\)"):
            selected([path], range(3))

    def test_images_that_the_store_lacks(self, build: Build) -> None:
        path = build("a.zarr", range(3))
        message = (
            rf"7 of 9 training images are not in the store {path} \(VOC2007/000004, VOC2007/000005, VOC2007/000006,"
            r" VOC2007/000007, VOC2007/000008, … 2 more\); it holds 3 images of 2007:train\n  next: .*extract-teachers"
        )
        with pytest.raises(StoreIncompleteError, match=message):
            selected([path], [*range(2, 10), 1]).arrays("dino", "features", VIEWS)

    def test_images_that_both_stores_lack(self, build: Build) -> None:
        paths = [build("a.zarr", range(3)), build("b.zarr", [3, 4]), build("c.zarr", range(9), teachers=["clip"])]
        message = (
            rf"1 of 6 training images are not in the stores {paths[0]}, {paths[1]} of teacher dino, view hflip"
            rf" \(VOC2007/000006\); {paths[0]} holds 3 images of 2007:train, {paths[1]} holds 2 images of 2007:train\n"
        )
        with pytest.raises(StoreIncompleteError, match=message):
            selected(paths, range(6)).arrays("dino", "features", ["hflip"])
        assert selected(paths, range(6)).arrays("clip", "logits", VIEWS)["logits"].num_images == 6

    def test_a_teacher_that_no_store_holds(self, build: Build) -> None:
        paths = [build("a.zarr", range(3), teachers=["clip"]), build("b.zarr", range(3), teachers=["clip"])]
        message = rf"no teacher 'dino' in the stores {paths[0]}, {paths[1]} \(found clip\)\n  next: .*--teacher dino"
        with pytest.raises(StoreIncompleteError, match=message):
            selected(paths, range(3)).arrays("dino", "features", VIEWS)
        with pytest.raises(StoreIncompleteError, match=rf"in the store {paths[0]} \(found clip\)"):
            selected(paths[:1], range(3)).manifest("dino")

    def test_a_view_that_no_store_holds(self, build: Build) -> None:
        path = build("a.zarr", range(3), views=["original"])
        message = rf"teacher dino: view 'hflip' is not in the store {path} \(found original\)\n  next: .*--view hflip"
        with pytest.raises(StoreIncompleteError, match=message):
            selected([path], range(3)).arrays("dino", "features", VIEWS)

    def test_an_array_that_the_teacher_lacks(self, build: Build) -> None:
        path = build("a.zarr", range(3))
        with pytest.raises(StoreIncompleteError, match=r"teacher clip: no features in .* \(found logits, embeddings\)"):
            selected([path], range(3)).arrays("clip", "features", VIEWS)

    @pytest.mark.parametrize("name", ["features", "scale_token", "scale_channel", "moments"])
    def test_shards_that_are_not_committed(self, build: Build, name: str) -> None:
        path = build("a.zarr", range(7), teachers=["dino"], feature_dtype="int8")
        ledger = path / "dino/original" / name / "ledger.jsonl"
        ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
        other = build("b.zarr", [7, 8], teachers=["dino"], feature_dtype="int8")
        message = (
            rf"{path}: dino/original/{name}: 1 of 3 training images are not committed \(VOC2007/000007\)\n"
            r"  next: run the same extract-teachers command again: it resumes"
        )
        asked = "moments" if name == "moments" else "features"
        with pytest.raises(StoreIncompleteError, match=message):
            selected([path, other], [6, 1, 7]).arrays("dino", asked, ["original"])
        assert selected([path, other], [1, 7]).arrays("dino", asked, ["original"])[asked].num_images == 2

    def test_damage_is_met_at_the_first_touch(self, build: Build) -> None:
        path = build("a.zarr", range(7))
        shard = path / "dino/original/features/c/1/0/0/0"
        damaged = bytearray(shard.read_bytes())
        damaged[70] ^= 1
        shard.write_bytes(damaged)
        features = selected([path], range(7)).arrays("dino", "features", ["original"])["features"]
        features.gather([0, 3], ["original"] * 2)
        with pytest.raises(StoreCorruptError, match="dino/original/features: shard 1, sample 4: checksum fails"):
            features.gather([4], ["original"])


def test_many_differences_are_cut_short(stores: TinyStores) -> None:
    paths = []
    for name in "ab":
        identity = {**IDENTITY, **{f"field_{n}": name for n in range(12)}}
        plan: StorePlan = stores.plan(3, teachers=[stores.teacher("dino", identity=identity)])
        paths.append(stores.build(plan, f"{name}.zarr"))
    with pytest.raises(StoreError) as caught:
        selected(paths, range(3)).arrays("dino", "features", VIEWS)
    assert len(re.findall(r"identity\.field", caught.value.message)) == 8
    assert caught.value.message.endswith("\n  … and 4 more")
