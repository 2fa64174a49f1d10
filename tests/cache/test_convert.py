"""Derived stores. The referee is numpy on the whole of the source, read by zarr-independent code or known from its
making; what is copied is compared byte for byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cache.derive
from cache.catalog import read_catalog
from cache.commands import derivation_command
from cache.convert import Conversion, convert
from cache.derive import ConvertRequest
from cache.int8 import dequantise, quantise
from cache.manifest import PcaManifest
from cache.plan import StorePlan, TeacherPlan, view_layouts
from cache.reader import TeacherStore, read_constant
from cache.samples import SampleEntry
from cache.verify import find_problems
from cache.zarr_storage import ZarrArray
from data.errors import StoreCorruptError, StoreIncompleteError, StoreStaleError, StoreWriteError, UsageError
from tests.cache.killing import run_killing

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

Array = NDArray[Any]
Tree = Callable[[Path], dict[str, bytes]]
COMMAND = "python cli.py convert-cache SRC DST"
VIEWS = ("original", "hflip")
REPOSITORY = Path(__file__).resolve().parents[2]


def converted(source: Path, name: str = "derived.zarr", **changes: Any) -> Path:
    """The path of the store derived from `source`, beside it."""
    return run(source, name, **changes).out


def run(source: Path, name: str = "derived.zarr", **changes: Any) -> Conversion:
    settings = {"source": source, "out": source.parent / name, "command": COMMAND, **changes}
    return convert(ConvertRequest(**settings))


def values(store: Path, path: str) -> Array:
    teacher, view, name = path.split("/")
    array = TeacherStore(store).array(teacher, view, name)  # type: ignore[arg-type]
    return array.gather(range(array.layout.num_samples))


def constant(store: Path, teacher: str, name: str) -> Array:
    catalog = read_catalog(store)
    return read_constant(catalog.storage, catalog.teachers[teacher], name)


def decoded(store: Path, target: str) -> Array:
    """All features of a teacher's view as numbers."""
    features = values(store, f"{target}/features")
    if features.dtype != np.int8:
        return features
    return dequantise(features, values(store, f"{target}/scale_channel"), values(store, f"{target}/scale_token"))


def svd_basis(features: Array, components: int) -> tuple[Array, Array, float]:
    """Mean and leading right singular vectors of all tokens at once, signs as the stored ones; their variance."""
    tokens = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean = tokens.mean(axis=0)
    _, strengths, rows = np.linalg.svd(tokens - mean, full_matrices=False)
    rows = rows[:components]
    signs = np.sign(rows[np.arange(components), np.abs(rows).argmax(axis=1)])
    return mean, rows * signs[:, None], float((strengths[:components] ** 2).sum() / (strengths**2).sum())


def arrays_of(store: Path, target: str) -> dict[str, Any]:
    teacher, view = target.split("/")
    return dict(read_catalog(store).teachers[teacher].views[view].manifest.arrays)  # type: ignore[index]


def notes(store: Path, array: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / array / "provenance.jsonl").read_text().splitlines()]


def is_sound(store: Path) -> bool:
    catalog = read_catalog(store)
    complete = all(array.num_missing == 0 for array in _arrays(store))
    return complete and find_problems(catalog, verify=True) == []


def _arrays(store: Path) -> list[Any]:
    opened = TeacherStore(store)
    paths = (layout.path.split("/") for layout in opened.catalog.layouts())
    return [opened.array(*path) for path in paths]  # type: ignore[arg-type]


@pytest.fixture
def source(whole_store: Path, tmp_path: Path) -> Path:
    """A complete float16 store of seven samples in shards of three."""
    return Path(shutil.copytree(whole_store, tmp_path / "store.zarr"))


class TestCopy:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
    def test_a_copy_has_the_very_bytes(self, stores: TinyStores, tree_of: Tree, dtype: str) -> None:
        source = stores.build(stores.plan(feature_dtype=dtype))
        copy = converted(source)
        assert tree_of(copy) == tree_of(source)
        assert read_catalog(copy).fingerprints == read_catalog(source).fingerprints

    def test_int8_is_not_quantised_again(self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch) -> None:
        source = stores.build(stores.plan(feature_dtype="int8"))
        monkeypatch.setattr("cache.encoding.quantise", lambda _: pytest.fail("quantised again"))
        assert is_sound(converted(source))

    def test_a_golden_store_is_copied(self, tmp_path: Path, tree_of: Tree) -> None:
        golden = Path(__file__).parent / "golden" / "format-1.zarr"
        assert tree_of(converted(golden, out=tmp_path / "copy.zarr")) == tree_of(golden)

    def test_a_derived_store_is_copied_with_its_basis_and_its_sources(self, source: Path, tree_of: Tree) -> None:
        derived = converted(source, components=3, dtype="int8")
        assert tree_of(converted(derived, "copy.zarr")) == tree_of(derived)

    def test_another_shard_size_changes_no_value_and_no_identity(self, source: Path) -> None:
        copy = converted(source, shard_samples=2)
        assert is_sound(copy)
        assert read_catalog(copy).fingerprint == read_catalog(source).fingerprint
        for path in read_catalog(source).fingerprints:
            np.testing.assert_array_equal(values(copy, path), values(source, path))
        assert len(list((copy / "dino/original/features/c").glob("*/0/0/0"))) == 4

    def test_teachers_that_differ_in_views_and_shards_are_copied_as_they_are(
        self, stores: TinyStores, tree_of: Tree
    ) -> None:
        stores.build(stores.plan(teachers=["dino"], views=["original"], batch_size=5))
        stores.build(stores.plan(teachers=["dino"], views=["hflip"], shard_samples=4, batch_size=6))
        source = stores.build(stores.plan(teachers=["clip"], views=["hflip"], shard_samples=2))
        assert tree_of(converted(source)) == tree_of(source)

    @pytest.mark.parametrize(
        ("chosen", "targets"),
        [
            ({"teachers": ("clip",)}, ["clip/hflip", "clip/original"]),
            ({"views": ("hflip",)}, ["clip/hflip", "dino/hflip"]),
            ({"teachers": ("dino",), "views": ("original",)}, ["dino/original"]),
        ],
        ids=str,
    )
    def test_only_what_is_chosen_is_taken_over(self, source: Path, chosen: dict[str, Any], targets: list[str]) -> None:
        copy = read_catalog(converted(source, **chosen))
        assert sorted({path.rpartition("/")[0] for path in copy.fingerprints}) == targets
        assert copy.fingerprints.items() <= read_catalog(source).fingerprints.items()
        assert copy.samples == read_catalog(source).samples


class TestDtype:
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("view", VIEWS)
    def test_int8_is_the_quantised_source(self, stores: TinyStores, dtype: str, view: str) -> None:
        source = stores.build(stores.plan(feature_dtype=dtype))
        derived = converted(source, dtype="int8")
        expected = quantise(values(source, f"dino/{view}/features"))
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(values(derived, f"dino/{view}/{name}"), array)
        assert is_sound(derived)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_int8_is_decoded_to_other_dtypes(self, stores: TinyStores, dtype: str) -> None:
        source = stores.build(stores.plan(feature_dtype="int8"))
        derived = converted(source, dtype=dtype)
        expected = decoded(source, "dino/hflip").astype(dtype)
        np.testing.assert_array_equal(values(derived, "dino/hflip/features"), expected)
        assert sorted(arrays_of(derived, "dino/hflip")) == ["features", "moments"]

    def test_what_is_no_feature_is_copied_bit_for_bit(self, source: Path, tree_of: Tree) -> None:
        of_clip = {path: data for path, data in tree_of(source).items() if path.startswith("clip/")}
        derived = tree_of(converted(source, dtype="int8"))
        assert {path: data for path, data in derived.items() if path.startswith("clip/")} == of_clip

    def test_the_logits_of_a_teacher_with_features_keep_their_identity(self, stores: TinyStores) -> None:
        both = stores.teacher("dino", outputs={"logits": (4,), "features": (3, 2, 5)})
        stores_values, stores.outputs = stores.values, lambda missing: {  # type: ignore[method-assign]
            name: stores_values("dino", missing.view, name, range(missing.first, missing.first + missing.count), shape)
            for name, shape in both.outputs.items()
        }  # fmt: skip
        source = stores.build(stores.plan(teachers=[both]))
        derived = converted(source, components=2)
        before, after = arrays_of(source, "dino/original"), arrays_of(derived, "dino/original")
        assert after["logits"] == before["logits"]
        assert after["features"].fingerprint != before["features"].fingerprint
        np.testing.assert_array_equal(values(derived, "dino/original/logits"), values(source, "dino/original/logits"))

    def test_a_value_that_float16_cannot_hold_names_its_image(self, stores: TinyStores) -> None:
        plan = stores.plan(teachers=["dino"], views=["original"], feature_dtype="float32")
        outputs = stores.outputs
        stores.outputs = lambda missing: {"features": outputs(missing)["features"] * 1e5}  # type: ignore[method-assign]
        source = stores.build(plan)
        message = r"dino/original/features: VOC2007/000001 \(sample 0\) has values that are not finite in float16"
        with pytest.raises(StoreWriteError, match=message):
            run(source, dtype="float16")


class TestPca:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
    def test_features_are_the_components_that_numpy_finds_over_the_whole_source(
        self, stores: TinyStores, dtype: str
    ) -> None:
        source = stores.build(stores.plan(feature_dtype=dtype))
        derived = converted(source, components=3, dtype="float32")
        mean, rows, share = svd_basis(decoded(source, "dino/original"), 3)
        basis = constant(derived, "dino", "pca")
        assert basis.dtype == np.float32
        np.testing.assert_allclose(basis[0], mean, atol=1e-7)
        np.testing.assert_allclose(basis[1:], rows, atol=2e-6)
        for view in VIEWS:  # one basis for both
            expected = (decoded(source, f"dino/{view}") - mean) @ rows.T
            np.testing.assert_allclose(values(derived, f"dino/{view}/features"), expected, atol=1e-5)
        pca = read_catalog(derived).teachers["dino"].manifest.pca
        assert pca is not None
        assert (pca.shape, pca.fit_samples) == ((4, 5), 7)
        assert pca.explained_variance == pytest.approx(share, abs=1e-6)
        assert pca.sha256 == hashlib.sha256(basis.tobytes()).hexdigest()

    def test_the_dtype_stays_that_of_the_source(self, stores: TinyStores) -> None:
        for dtype in ("float16", "float32", "int8"):
            source = stores.build(stores.plan(feature_dtype=dtype), f"{dtype}.zarr")
            assert (
                arrays_of(converted(source, f"pca-{dtype}.zarr", components=2), "dino/hflip")["features"].dtype == dtype
            )

    def test_components_are_quantised_from_full_precision(self, source: Path) -> None:
        projected = values(converted(source, components=3, dtype="float32"), "dino/hflip/features")
        derived = converted(source, "int8.zarr", components=3, dtype="int8")
        for name, array in quantise(projected)._asdict().items():
            np.testing.assert_array_equal(values(derived, f"dino/hflip/{name}"), array)

    def test_it_is_fitted_on_the_chosen_samples_alone(self, source: Path) -> None:
        ids = ["VOC2007/000006", "VOC2007/000002", "VOC2007/000003", "VOC2012/000001"]
        derived = converted(source, components=2, fit_ids=ids)
        mean, rows, _ = svd_basis(values(source, "dino/original/features")[[1, 2, 5]], 2)
        np.testing.assert_allclose(constant(derived, "dino", "pca"), np.vstack([mean, rows]), atol=2e-6)
        pca = read_catalog(derived).teachers["dino"].manifest.pca
        assert pca is not None
        assert pca.fit_samples == 3
        in_row_order = b'["VOC2007/000002","VOC2007/000003","VOC2007/000006"]'
        assert pca.fit_samples_sha256 == hashlib.sha256(in_row_order).hexdigest()

    def test_the_original_view_is_fitted_on_when_only_another_is_taken_over(self, source: Path) -> None:
        both, one = converted(source, components=3), converted(source, "one.zarr", components=3, views=("hflip",))
        np.testing.assert_array_equal(constant(one, "dino", "pca"), constant(both, "dino", "pca"))
        assert list(read_catalog(one).teachers["dino"].views) == ["hflip"]

    def test_shards_change_nothing(self, stores: TinyStores, source: Path) -> None:
        small = stores.build(stores.plan(shard_samples=1), "small.zarr")
        one, other = converted(source, components=3), converted(small, "other.zarr", components=3)
        assert read_catalog(one).fingerprint == read_catalog(other).fingerprint
        np.testing.assert_array_equal(values(one, "dino/hflip/features"), values(other, "dino/hflip/features"))

    def test_all_components_lose_nothing(self, source: Path) -> None:
        done = run(source, components=5, dtype="float32")
        for view in done.views:
            if view.fidelity is not None:
                assert view.fidelity.cosine_p01 > 1 - 1e-6
                assert view.fidelity.relative_error == pytest.approx(0, abs=1e-6)


class TestIdentity:
    def test_what_changes_names_the_features_it_came_from(self, source: Path) -> None:
        derived = converted(source, components=3, dtype="int8")
        for view in VIEWS:
            origin = arrays_of(source, f"dino/{view}")["features"].fingerprint
            found = {name: array.source for name, array in arrays_of(derived, f"dino/{view}").items()}
            assert found == dict.fromkeys(("features", "moments", "scale_channel", "scale_token"), origin)
            assert {array.source for array in arrays_of(derived, f"clip/{view}").values()} == {None}
        one, other = (read_catalog(store).teachers["dino"].manifest for store in (source, derived))
        assert (one.identity, one.probe, one.untrained) == (other.identity, other.probe, other.untrained)

    def test_no_two_derivations_share_a_fingerprint(self, source: Path) -> None:
        settings: list[dict[str, Any]] = [
            {},
            {"dtype": "float32"},
            {"dtype": "int8"},
            {"components": 3},
            {"components": 2},
            {"components": 3, "dtype": "int8"},
            {"components": 3, "fit_ids": ["VOC2007/000001"]},
        ]
        catalogs = [read_catalog(converted(source, f"{n}.zarr", **s)) for n, s in enumerate(settings)]
        for array in ("features", "moments"):
            assert len({c.fingerprints[f"dino/hflip/{array}"] for c in catalogs}) == len(settings)

    @pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"components": 3}, {"components": 3, "dtype": "int8"}])
    def test_moments_are_the_sums_over_what_a_student_reads(self, source: Path, settings: dict[str, Any]) -> None:
        derived = converted(source, **settings)
        for view in VIEWS:
            tokens = decoded(derived, f"dino/{view}").astype(np.float64)
            tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
            moments = values(derived, f"dino/{view}/moments")
            np.testing.assert_allclose(moments[:, 0], tokens.sum(axis=1), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(moments[:, 1], (tokens**2).sum(axis=1), rtol=1e-6)


class TestFidelity:
    @pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"components": 3, "dtype": "int8"}])
    def test_the_figures_are_those_of_what_is_read(self, source: Path, settings: dict[str, Any]) -> None:
        done = run(source, **settings)
        for view in done.views:
            if view.teacher == "clip":
                assert view.fidelity is None
                continue
            restored = decoded(done.out, f"dino/{view.view}").astype(np.float64)
            if "components" in settings:
                basis = constant(done.out, "dino", "pca").astype(np.float64)
                restored = restored @ basis[1:] + basis[0]
            original = values(source, f"dino/{view.view}/features").astype(np.float64).reshape(-1, 5)
            restored = restored.reshape(-1, 5)
            norms = np.linalg.norm(original, axis=1) * np.linalg.norm(restored, axis=1)
            cosines = (original * restored).sum(axis=1) / norms
            error = ((original - restored) ** 2).sum()
            scatter = ((original - original.mean(axis=0)) ** 2).sum()
            assert view.fidelity is not None
            assert view.fidelity.samples == 7
            assert view.fidelity.cosine_mean == pytest.approx(cosines.mean(), abs=1e-6)
            assert view.fidelity.cosine_p01 == pytest.approx(np.percentile(cosines, 1), abs=1e-6)
            assert view.fidelity.relative_error == pytest.approx(np.sqrt(error / (original**2).sum()), abs=1e-6)
            assert view.fidelity.explained_variance == pytest.approx(1 - error / scatter, abs=1e-6)

    def test_a_bounded_number_of_evenly_spaced_samples_is_compared(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cache.convert.MEASURED_SAMPLES", 3)
        source = stores.build(stores.plan(teachers=["dino"], views=["original"]))
        reads: list[int] = []
        numbers = cache.derive.ViewReader.features
        monkeypatch.setattr(
            cache.derive.ViewReader, "features", lambda self, row: (reads.append(row), numbers(self, row))[1]
        )
        (view,) = run(source).views
        assert view.fidelity is not None
        assert view.fidelity.samples == 3
        assert reads == [0, 0, 3, 3, 6, 6]  # of both stores

    def test_bytes_are_those_on_the_disk(self, source: Path) -> None:
        done = run(source, components=3, dtype="int8")
        for view in done.views:
            for store, counted in ((source, view.bytes_before), (done.out, view.bytes_after)):
                shards = (store / view.teacher / view.view).glob("*/c/**/0")
                assert counted == sum(path.stat().st_size for path in shards if path.is_file())


class TestProvenance:
    def test_a_note_says_from_what_how_and_how_well(self, source: Path) -> None:
        done = run(source, dtype="int8")
        started, finished = notes(done.out, "dino/original/features")
        result = next(v for v in done.views if (v.teacher, v.view) == ("dino", "original"))
        assert result.fidelity is not None
        assert finished["fidelity"] == result.fidelity.model_dump()
        assert (finished["bytes_before"], finished["bytes_after"]) == (result.bytes_before, result.bytes_after)
        for note in (started, finished):
            assert note["command"] == COMMAND
            assert note["source"]["store"] == str(source)
        ledger = (source / "dino/original/features/ledger.jsonl").read_bytes()
        assert finished["source"]["content"]["features"] == hashlib.sha256(ledger).hexdigest()
        assert sorted(finished["source"]["content"]) == ["features", "moments"]
        assert "fidelity" not in notes(done.out, "dino/original/moments")[-1]
        assert "fidelity" not in notes(done.out, "clip/original/logits")[-1]

    def test_the_command_names_the_place_where_the_store_lies_now(self, stores: TinyStores, source: Path) -> None:
        command = "python cli.py convert-cache 'my store.zarr' DST --pca 3 --fit-set 2007:train"
        done = run(source, components=3, command=command)
        moved = done.out.rename(stores.folder / "moved here.zarr")
        expected = f"python cli.py convert-cache 'my store.zarr' '{moved}' --pca 3 --fit-set 2007:train"
        assert derivation_command(read_catalog(moved)) == expected
        assert derivation_command(read_catalog(moved), "clip/hflip/logits") == expected

    def test_a_killed_runs_store_knows_its_command(
        self, stores: TinyStores, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(source)
        found = derivation_command(read_catalog(stores.folder / "derived.zarr"), "dino/hflip/features")
        assert found == f"python cli.py convert-cache SRC {stores.folder / 'derived.zarr'}"

    def test_an_extracted_store_has_no_command(self, whole_store: Path) -> None:
        assert derivation_command(read_catalog(whole_store)) is None

    @pytest.mark.parametrize(
        ("note", "shown"),
        [
            ({"command": "rm -rf /"}, None),
            ({"command": ["python", "cli.py", "convert-cache", "a", "b"]}, None),
            ({"command": "python cli.py convert-cache"}, None),
            ({"command": "python cli.py convert-cache 'a"}, None),
            ({"command": "python cli.py convert-cache a b \x1b[31m"}, None),
            ({"command": "python cli.py convert-cache a;reboot b $(reboot)"}, "'a;reboot' STORE '$(reboot)'"),
            ({}, None),
        ],
        ids=str,
    )
    def test_a_note_is_untrusted(self, store: Path, note: dict[str, Any], shown: str | None) -> None:
        layout = read_catalog(store).layouts()[0]
        ZarrArray(store, layout).append_provenance(note)
        expected = None if shown is None else f"python cli.py convert-cache {shown.replace('STORE', str(store))}"
        assert derivation_command(read_catalog(store)) == expected


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, of: str = "features") -> None:
    """Interrupt the commit of one shard more of the arrays of that name."""
    write_shard = ZarrArray.write_shard
    done = [0]

    def write(self: ZarrArray, shard: int, data: NDArray[np.generic], rank: int) -> Any:
        if self.layout.path.endswith(f"/{of}"):
            done[0] += 1
            if done[0] > shards:
                raise KeyboardInterrupt
        return write_shard(self, shard, data, rank)

    monkeypatch.setattr(ZarrArray, "write_shard", write)


KILLS = """
conftest = runpy.run_path(sys.argv[1])
from cache.convert import convert
from cache.derive import ConvertRequest


def build(name):
    convert(ConvertRequest(stores.folder / "store.zarr", stores.folder / name, "", components=2, dtype="int8"))


forked(lambda: stores.build(stores.plan(4, teachers=["dino"])))
forked(lambda: build("whole.zarr"))
whole = conftest["tree"](stores.folder / "whole.zarr")
killed, num_steps = 0, number_of_steps(lambda: build("counted.zarr"))
for last in random.Random(0).sample(range(1, num_steps + 1), 6):
    killed += forked(lambda: build("derived.zarr"), last=last)
    assert not forked(lambda: build("derived.zarr"))
    assert conftest["tree"](stores.folder / "derived.zarr") == whole, last
    assert "fidelity" in (stores.folder / "derived.zarr/dino/hflip/features/provenance.jsonl").read_text()
    shutil.rmtree(stores.folder / "derived.zarr")
print(killed)
"""


class TestResume:
    @pytest.mark.parametrize("settings", [{}, {"dtype": "int8"}, {"components": 3, "dtype": "int8"}], ids=str)
    @pytest.mark.parametrize("of", ["moments", "features"])
    def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(
        self, source: Path, tree_of: Tree, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], of: str
    ) -> None:
        whole = tree_of(converted(source, "whole.zarr", **settings))
        for shards, left in ((0, 22), (4, 2)):  # the logits of the same range are committed before
            with monkeypatch.context() as patched:
                stop_after(patched, shards, of)
                with pytest.raises(KeyboardInterrupt):
                    run(source, **settings)
            done = run(source, **settings)
            assert tree_of(done.out) == whole
            assert done.written == left
            shutil.rmtree(done.out)

    def test_killed_conversions_are_resumed(self, tmp_path: Path) -> None:
        assert run_killing(tmp_path, KILLS) == [6]

    def test_a_complete_store_is_not_touched(self, source: Path) -> None:
        def state() -> dict[Path, tuple[int, int]]:
            return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")}

        first = run(source, components=3)
        out = first.out
        before = state()
        again = run(source, components=3)
        assert state() == before
        assert again.written == 0
        assert again.views == first.views  # fidelity is read back
        assert again.bases == first.bases

    def test_the_stored_basis_is_kept_and_not_fitted_again(
        self, stores: TinyStores, source: Path, tree_of: Tree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = tree_of(converted(source, components=3))
        (stores.folder / "derived.zarr/dino/hflip/features/ledger.jsonl").unlink()
        monkeypatch.setattr(cache.derive, "fit_basis", lambda *_: pytest.fail("fitted again"))
        assert tree_of(converted(source, components=3)) == whole

    def test_a_lost_measurement_is_made_again(self, source: Path) -> None:
        done = run(source, dtype="int8")
        path = done.out / "dino/hflip/features/provenance.jsonl"
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])  # killed before the second note
        assert run(source, dtype="int8").views == done.views
        assert notes(done.out, "dino/hflip/features")[-1]["fidelity"]["samples"] == 7

    @pytest.mark.parametrize(
        "first", [{"views": ("original",)}, {"views": ("hflip",)}, {"teachers": ("clip",)}, {"teachers": ("dino",)}]
    )
    def test_a_view_or_a_teacher_is_added_later(self, source: Path, tree_of: Tree, first: dict[str, Any]) -> None:
        settings: dict[str, Any] = {"components": 3, "dtype": "int8"}
        whole = tree_of(converted(source, "whole.zarr", **settings))
        if first.get("teachers") == ("clip",):
            converted(source, dtype="int8", **first)  # a PCA of a teacher without features is refused
        else:
            converted(source, **settings, **first)
        assert tree_of(converted(source, **settings)) == whole


class TestRepair:
    def test_a_damaged_shard_is_written_again(self, source: Path, tree_of: Tree) -> None:
        settings: dict[str, Any] = {"components": 3, "dtype": "int8"}
        store = converted(source, **settings)
        whole = tree_of(store)
        shard = store / "dino/original/features/c/1/0/0/0"
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
        assert not is_sound(store)
        shown: list[str] = []

        @contextmanager
        def show(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
            shown.append(what)
            yield lambda _: None
            shown.append(f"{what} ended")

        done = convert(ConvertRequest(source, store, COMMAND, repair=True, **settings), show)
        assert [(r.array, r.shard, r.same_bytes) for r in done.repairs] == [("dino/original/features", 1, True)]
        assert tree_of(store) == whole
        stages = ("verifying", "converting", "measuring")  # one after another: a terminal shows one bar at a time
        assert shown == [word for what in stages for word in (what, f"{what} ended")]

    @pytest.mark.parametrize("damaged", ["dino/pca/c/0/0", "dino/pca/zarr.json", "dino/zarr.json", "zarr.json"])
    def test_a_damaged_basis_or_manifest_is_mended_by_the_same_fit(
        self, source: Path, tree_of: Tree, damaged: str
    ) -> None:
        store = converted(source, components=3)
        whole = tree_of(store)
        path = store / damaged
        path.write_bytes(path.read_bytes()[:-10] + bytes(10))
        with pytest.raises(StoreCorruptError):
            run(source, components=3)
        run(source, components=3, repair=True)
        assert tree_of(store) == whole

    def test_a_basis_that_comes_out_otherwise_is_refused(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = converted(source, components=3) / "dino/pca/c/0/0"
        path.write_bytes(path.read_bytes()[:-10] + bytes(10))
        fit_basis = cache.derive.fit_basis

        def another(*args: Any) -> Any:
            basis = fit_basis(*args)
            values = np.nextafter(basis.values, np.float32(2))
            manifest = basis.manifest.model_copy(update={"sha256": hashlib.sha256(values.tobytes()).hexdigest()})
            return dataclasses.replace(basis, manifest=manifest, values=values)

        monkeypatch.setattr(cache.derive, "fit_basis", another)
        with pytest.raises(StoreStaleError, match=r"dino\.pca\.sha256: stored \w+, found \w+"):
            run(source, components=3, repair=True)


USAGE: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown teacher": (
        {"teachers": ("dino", "vit")},
        r"store\.zarr: no teacher 'vit' in this store \(it has clip, dino\)",
    ),
    "no component": ({"components": 0}, "--pca: expected 1 to 5 components of dino, found 0"),
    "more components than channels": ({"components": 6}, "--pca: expected 1 to 5 components of dino, found 6"),
    "a teacher without features": (
        {"components": 2, "teachers": ("clip",)},
        r"--pca: no features of clip in .*store\.zarr \(teachers with features: dino\)",
    ),
    "a fit set that the store lacks": (
        {"components": 2, "fit_ids": ["VOC2012/000001", "VOC2012/000002"]},
        r"--fit-set: none of its 2 images is in .*store\.zarr, which holds 7 images of 2007:train",
    ),
    "the source itself": ({"out": "store.zarr"}, "cannot be converted into itself"),
    "a place inside the source": ({"out": "store.zarr/dino/derived.zarr"}, "one lies inside the other"),
    "a place around the source": ({"out": "."}, "one lies inside the other"),
}


class TestRefusals:
    @pytest.mark.parametrize(("settings", "message"), USAGE.values(), ids=USAGE)
    def test_what_cannot_be_asked_is_a_usage_error(
        self, stores: TinyStores, source: Path, tree_of: Tree, settings: dict[str, Any], message: str
    ) -> None:
        before = tree_of(source)
        if "out" in settings:
            settings = {**settings, "out": stores.folder / settings["out"]}
        with pytest.raises(UsageError, match=message):
            run(source, **settings)
        assert tree_of(source) == before
        assert not (stores.folder / "derived.zarr").exists()

    def test_the_source_behind_a_link_is_the_source(self, stores: TinyStores, source: Path) -> None:
        (stores.folder / "link.zarr").symlink_to(source)
        with pytest.raises(UsageError, match="cannot be converted into itself"):
            run(source, "link.zarr")

    def test_an_unknown_view_is_a_usage_error_that_lists_them(self, stores: TinyStores) -> None:
        source = stores.build(stores.plan(views=["original"]))
        with pytest.raises(UsageError, match=r"no view 'hflip' of teacher clip in this store \(it has original\)"):
            run(source, views=("hflip",))

    def test_more_components_than_tokens_are_a_usage_error(self, stores: TinyStores) -> None:
        narrow = stores.teacher("dino", outputs={"features": (1, 1, 5)})
        stores.outputs = lambda missing: {"features": np.ones((missing.count, 1, 1, 5), np.float32)}  # type: ignore[method-assign]
        source = stores.build(stores.plan(teachers=[narrow]))
        with pytest.raises(UsageError, match=r"at least 3 tokens of dino to fit 3 components on, found 2"):
            run(source, components=3, fit_ids=["VOC2007/000001", "VOC2007/000002"])

    def test_a_pca_of_a_pca_is_a_usage_error(self, source: Path) -> None:
        once = converted(source, components=3)
        with pytest.raises(UsageError, match=r"features of dino in .*derived\.zarr are components of a PCA already"):
            run(once, "twice.zarr", components=2)

    def test_an_incomplete_source_is_refused_array_by_array(self, stores: TinyStores) -> None:
        source = stores.build(limit=5)
        with pytest.raises(StoreIncompleteError) as caught:
            run(source)
        said = str(caught.value)
        assert caught.value.exit_code == 3
        assert "  dino/original/features: 1 of 7 missing\n" in said
        assert "  dino/hflip/moments: 4 of 7 missing\n" in said
        assert "python cli.py extract-teachers --voc-root DIR" in said
        assert not (stores.folder / "derived.zarr").exists()

    def test_what_is_not_converted_may_be_incomplete(self, source: Path) -> None:
        (source / "clip/hflip/logits/ledger.jsonl").unlink()
        assert is_sound(converted(source, teachers=("dino",)))
        assert is_sound(converted(source, "views.zarr", views=("original",)))

    def test_a_fit_needs_the_original_view(self, stores: TinyStores, source: Path) -> None:
        (source / "dino/original/features/ledger.jsonl").unlink()
        with pytest.raises(StoreIncompleteError, match="dino/original/features: 7 of 7 missing"):
            run(source, views=("hflip",), components=3)
        lacking = stores.build(stores.plan(views=["hflip"]), "hflip.zarr")
        with pytest.raises(StoreIncompleteError, match="view 'original' is not in the store"):
            run(lacking, components=3)

    @pytest.mark.parametrize("settings", [{}, {"dtype": "int8"}, {"components": 3}], ids=str)
    def test_a_damaged_sample_of_the_source_is_named(self, source: Path, settings: dict[str, Any]) -> None:
        shard = source / "dino/original/features/c/1/0/0/0"
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
        with pytest.raises(StoreCorruptError) as caught:
            run(source, **settings)
        assert f"{source}: dino/original/features: shard 1, sample 3: checksum fails" in str(caught.value)
        assert f"inspect-cache {source} --verify" in str(caught.value)

    def test_a_damaged_constant_of_the_source_is_named(self, source: Path) -> None:
        path = source / "clip/text_embeddings/c/0/0"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        with pytest.raises(StoreCorruptError, match=rf"{source}: clip/text_embeddings: checksum fails"):
            run(source)

    def test_something_else_at_the_destination_is_refused_before_the_fit(
        self, stores: TinyStores, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache.derive, "fit_basis", lambda *_: pytest.fail("fitted"))
        (stores.folder / "derived.zarr").write_bytes(b"a file")
        with pytest.raises(StoreWriteError, match=r"derived\.zarr: something that is not a store is already there"):
            run(source, components=3)
        assert (stores.folder / "derived.zarr").read_bytes() == b"a file"

    @pytest.mark.parametrize(
        ("first", "then", "named"),
        [
            ({}, {"dtype": "int8"}, r"arrays\.features\.dtype: stored float16, found int8"),
            ({"dtype": "int8"}, {}, r"arrays\.features\.dtype: stored int8, found float16"),
            ({"components": 3}, {"components": 2}, r"dino\.pca\.shape: stored \[4,5\], found \[3,5\]"),
            ({"components": 3}, {}, r"dino\.pca: stored \{.*, found null"),
            ({"dtype": "int8"}, {"components": 3, "dtype": "int8"}, r"dino\.pca: stored null, found \{"),
            (
                {"components": 3},
                {"components": 3, "fit_ids": ["VOC2007/000001"]},
                r"dino\.pca\.fit_samples: stored 7, found 1",
            ),
            ({"dtype": "int8"}, {"dtype": "int8", "shard_samples": 2}, r"layout\.shard_samples: stored 3, found 2"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused_by_the_field(
        self, source: Path, tree_of: Tree, first: dict[str, Any], then: dict[str, Any], named: str
    ) -> None:
        store = converted(source, **first)
        before = tree_of(store)
        with pytest.raises(StoreStaleError, match=named) as caught:
            run(source, **then)
        assert caught.value.exit_code == 3
        assert tree_of(store) == before

    def test_another_source_is_refused_by_the_field(self, stores: TinyStores, source: Path) -> None:
        converted(source, dtype="int8")
        wide = stores.build(stores.plan(feature_dtype="float32"), "wide.zarr")
        with pytest.raises(StoreStaleError, match=r"arrays\.features\.source: stored \w+, found \w+"):
            run(wide, dtype="int8")
        other = stores.build(stores.plan(5), "other.zarr")
        with pytest.raises(StoreStaleError, match=r"dataset\.samples: stored 2007:train: 7 images"):
            run(other, dtype="int8")

    def test_derived_and_extracted_stores_are_not_taken_for_each_other(self, stores: TinyStores, source: Path) -> None:
        derived = converted(source, dtype="int8")
        with pytest.raises(StoreStaleError, match=r"features\.source: stored \w+, found null") as caught:
            stores.build(stores.plan(feature_dtype="int8"), "derived.zarr")
        assert "convert-cache made this store" in str(caught.value)
        one_view = converted(source, "one.zarr", dtype="int8", views=("original",))
        with pytest.raises(StoreStaleError, match=r"features\.source: stored .*another store, found null"):
            stores.build(stores.plan(feature_dtype="int8", views=["hflip"]), "one.zarr")
        assert list(read_catalog(one_view).teachers["dino"].views) == ["original"]
        extracted = stores.build(stores.plan(feature_dtype="int8"), "int8.zarr")
        with pytest.raises(StoreStaleError, match=r"features\.source: stored null, found \w+") as caught:
            run(source, extracted.name, dtype="int8")
        assert "as they were extracted" in str(caught.value)
        assert is_sound(derived)

    def test_a_projected_store_takes_no_extracted_view(self, stores: TinyStores, source: Path) -> None:
        converted(source, components=3)
        with pytest.raises(StoreStaleError, match=r"dino\.pca: stored \{.*, found null") as caught:
            stores.build(name="derived.zarr")
        assert "convert-cache made this store" in str(caught.value)


class TestHdf5:
    @pytest.mark.parametrize("settings", [{}, {"dtype": "int8"}, {"components": 3, "dtype": "int8"}], ids=str)
    def test_there_and_back_gives_the_same_shards(self, source: Path, tree_of: Tree, settings: dict[str, Any]) -> None:
        folder = converted(source, **settings)
        file = converted(source, "derived.h5", **settings)
        assert file.is_file()
        assert is_sound(file)
        assert read_catalog(file).fingerprints == read_catalog(folder).fingerprints
        back = tree_of(converted(file, "back.zarr"))
        whole = tree_of(folder)
        assert back.keys() == whole.keys()
        for path, data in whole.items():
            if path.endswith("zarr.json"):
                assert json.loads(back[path]) == json.loads(data)
            else:
                assert back[path] == data

    def test_an_interrupted_file_is_resumed(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from cache.hdf5_storage import Hdf5Array

        settings: dict[str, Any] = {"components": 3, "dtype": "int8"}
        whole = converted(source, **settings)
        write_shard = Hdf5Array.write_shard
        left = iter(range(9))

        def write(self: Hdf5Array, *args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write_shard(self, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Hdf5Array, "write_shard", write)
            with pytest.raises(KeyboardInterrupt):
                run(source, "derived.h5", **settings)
        file = converted(source, "derived.h5", **settings)
        assert is_sound(file)
        for path in read_catalog(whole).fingerprints:
            np.testing.assert_array_equal(values(file, path), values(whole, path))
        assert derivation_command(read_catalog(file)) == f"python cli.py convert-cache SRC {file}"

    def test_the_format_may_be_given_whatever_the_name(self, source: Path) -> None:
        assert converted(source, "derived.zarr", format="hdf5").is_file()

    def test_teachers_that_are_not_alike_are_refused_by_name(self, stores: TinyStores) -> None:
        stores.build(stores.plan(teachers=["dino"]))
        source = stores.build(stores.plan(teachers=["clip"], views=["hflip"], shard_samples=2))
        with pytest.raises(UsageError, match=r"made in one go") as caught:
            run(source, "derived.h5")
        assert "clip: hflip, shards of 2 samples" in str(caught.value)
        assert is_sound(converted(source, "derived.h5", views=("hflip",), shard_samples=2))


class TestSize:
    def test_dinov2_b_of_voc_fits_4_gb_a_view(self) -> None:
        """768 channels of 30×30 tokens over the 16,551 images of VOC 2007 + 2012 trainval, PCA-256, int8."""
        pca = PcaManifest(shape=(257, 768), sha256="0", fit_samples=1, fit_samples_sha256="0", explained_variance=1)
        sample = SampleEntry("VOC2007/000001", 375, 500, "0" * 64)
        samples = [dataclasses.replace(sample, id=f"VOC2007/{n:06d}") for n in range(16_551)]
        teacher = TeacherPlan(
            "dinov2_vitb14", {}, False, np.ones(4, np.float32), {"features": (30, 30, 256)}, feature_dtype="int8"
        )
        plan = StorePlan(("2007:trainval",), None, samples, [teacher], ["original"], "int8", 64, None)
        # tokens, token scales, channel scales, moments
        assert plan.planned_bytes() == 16_551 * (900 * 256 + 4 * 900 + 4 * 256 + 4 * 2 * 256)
        view = plan.view_manifest(plan.root_manifest(), teacher, "original", 16)
        layouts = view_layouts(plan.root_manifest(), teacher.key, view)
        on_disk = sum(la.shard_file_bytes(shard) for la in layouts.values() for shard in range(la.num_shards))
        # and a checksum a sample; 259 shards with an index of 64 places; three small arrays padded to 64 samples
        padding = (259 * 64 - 16_551) * (4 * 900 + 4 * 256 + 4 * 2 * 256)
        assert on_disk == plan.planned_bytes() + 16_551 * 4 + 259 * (64 * 16 + 4) + 259 * 3 * 4 + padding
        assert on_disk + 4 * pca.shape[0] * pca.shape[1] + 4 <= 4e9

    def test_memory_does_not_depend_on_the_number_of_samples(self, stores: TinyStores) -> None:
        wide = stores.teacher("dino", outputs={"features": (8, 8, 256)})
        stores.outputs = lambda missing: {  # type: ignore[method-assign]
            "features": stores.values("dino", "original", "features", range(missing.count), (8, 8, 256))
        }
        peaks = []
        for count in (16, 96):
            plan = stores.plan(count, teachers=[wide], views=["original"], shard_samples=8)
            source = stores.build(plan, f"{count}.zarr")
            tracemalloc.start()
            converted(source, f"derived-{count}.zarr", components=64, dtype="int8")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.25 * peaks[0]
