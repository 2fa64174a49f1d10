"""New logits in a store. The referee is plain sums over the embeddings as they were made; what was there stays."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.canonical import Json
from cache.catalog import read_catalog
from cache.convert import convert
from cache.derive import ConvertRequest
from cache.plan import TeacherPlan
from cache.reader import TeacherStore
from cache.relabel import Relabelling, RelabelRequest, relabel
from cache.relabel_source import find_source, refuse_other_identity, refuse_source, stored_text_embeddings
from cache.summary import summarise
from cache.verify import find_problems
from cache.zarr_storage import ZarrArray
from data.errors import StoreCorruptError, StoreIncompleteError, StoreStaleError, StoreWriteError, UsageError
from data.geometry import View
from tests.cache.killing import run_killing

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

Tree = Callable[[Path], dict[str, bytes]]
VIEWS: tuple[View, ...] = ("original", "hflip")
COMMAND = "python cli.py relabel-logits STORE --prompts plain.yaml"
TEXT = np.random.default_rng(5).normal(size=(4, 6)).astype(np.float32)
IDENTITY = {"spec": "clip", "input_size": [420, 420], "normalisation": {"mean": [0.485, 0.456, 0.406]}}


def request(**changes: Any) -> RelabelRequest:
    settings: dict[str, Any] = {
        "source": "clip",
        "key": "clip_plain",
        "identity": {**IDENTITY, "prompts": ["plain"]},
        "text_embeddings": TEXT,
        "logit_scale": 100.0,
        "logit_bias": None,
        "facts": {"command": COMMAND},
    }
    return RelabelRequest(**{**settings, **changes})


def run(store: Path, judge: Callable[[], Mapping[str, Json]] = dict, **changes: Any) -> Relabelling:
    return relabel(read_catalog(store), request(**changes), judge=judge)


def logits(store: Path, view: View, key: str = "clip_plain") -> NDArray[np.float32]:
    array = TeacherStore(store).array(key, view, "logits")
    return array.gather(range(array.layout.num_samples))


def notes(store: Path, view: View = "original", key: str = "clip_plain") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / key / view / "logits/provenance.jsonl").read_text().splitlines()]


def renamed(stores: TinyStores, key: str, identity: dict[str, Any], **changes: Any) -> TeacherPlan:
    return dataclasses.replace(stores.teacher("clip"), key=key, identity=identity, **changes)


def is_sound(store: Path) -> bool:
    return find_problems(read_catalog(store), verify=True) == []


class TestLogits:
    @pytest.mark.parametrize(("scale", "bias"), [(100.0, None), (4.5, -10.25)])
    def test_they_are_scaled_products_of_image_and_text_embeddings(
        self, stores: TinyStores, store: Path, scale: float, bias: float | None
    ) -> None:
        assert run(store, logit_scale=scale, logit_bias=bias).written == 14
        for view in VIEWS:
            for row, found in enumerate(logits(store, view)):
                image = stores.values("clip", view, "embeddings", [row])[0].tolist()
                expected = [scale * sum(i * t for i, t in zip(image, text, strict=True)) for text in TEXT.tolist()]
                np.testing.assert_allclose(found, np.array(expected) + (bias or 0), rtol=1e-6)

    def test_nothing_that_was_there_is_touched(self, store: Path, tree_of: Tree) -> None:
        before = tree_of(store)
        fingerprints = read_catalog(store).fingerprints
        run(store)
        after = tree_of(store)
        assert {path: after[path] for path in before} == before
        assert {path.partition("/")[0] for path in after.keys() - before.keys()} == {"clip_plain"}
        assert fingerprints.items() < read_catalog(store).fingerprints.items()
        assert is_sound(store)

    def test_the_new_teacher_says_what_it_was_made_from(self, store: Path) -> None:
        run(store)
        catalog = read_catalog(store)
        source, made = (catalog.teachers[key] for key in ("clip", "clip_plain"))
        assert made.manifest.identity == {**IDENTITY, "prompts": ["plain"]}
        assert (made.manifest.probe, made.manifest.untrained) == (source.manifest.probe, source.manifest.untrained)
        np.testing.assert_array_equal(TeacherStore(store).text_embeddings("clip_plain"), TEXT)
        for view in VIEWS:
            (array,) = made.views[view].manifest.arrays.values()
            assert array.source == catalog.fingerprints[f"clip/{view}/embeddings"]
            assert made.views[view].manifest.layout == source.views[view].manifest.layout

    def test_views_that_are_cut_differently_are_cut_as_their_sources(self, stores: TinyStores) -> None:
        stores.build(stores.plan(teachers=["clip"], views=["original"], batch_size=5))
        store = stores.build(stores.plan(teachers=["clip"], views=["hflip"], shard_samples=2, batch_size=6))
        assert run(store).written == 14
        views = read_catalog(store).teachers["clip_plain"].views
        found = {view: (s.manifest.layout.shard_samples, s.manifest.layout.batch_size) for view, s in views.items()}
        assert found == {"original": (3, 5), "hflip": (2, 6)}

    def test_a_view_that_came_later_is_added(self, stores: TinyStores, store: Path, tree_of: Tree) -> None:
        run(store)
        part = stores.build(stores.plan(views=["original"]), "part.zarr")
        assert run(part).written == 7
        stores.build(name="part.zarr")
        assert run(part).written == 7
        assert tree_of(part) == tree_of(store)

    def test_prompts_differ_in_fingerprint_and_live_side_by_side(self, store: Path) -> None:
        for key, identity in (("a", "plain"), ("b", "other"), ("c", "plain")):
            run(store, key=key, identity={**IDENTITY, "prompts": identity})
        found = read_catalog(store).fingerprints
        assert found["a/original/logits"] == found["c/original/logits"] != found["b/original/logits"]


class TestProvenance:
    def test_two_notes_tell_command_source_cost_and_judgement(self, store: Path) -> None:
        done = run(store, judge=lambda: {"multilabel_map": 0.25})
        assert done.judgement == {"multilabel_map": 0.25}
        started, finished = notes(store)
        ledger = (store / "clip/original/embeddings/ledger.jsonl").read_bytes()
        origin = {"array": "clip/original/embeddings", "content": hashlib.sha256(ledger).hexdigest()}
        for note in (started, finished):
            assert (note["command"], note["source"]) == (COMMAND, origin)
        assert (finished["samples"], finished["multilabel_map"]) == (7, 0.25)
        assert finished["seconds_all_views"] >= 0
        assert "seconds_all_views" not in started
        assert "multilabel_map" not in notes(store, "hflip")[-1]

    def test_a_judgement_that_came_later_is_noted_once(self, store: Path) -> None:
        run(store)
        for _ in range(2):
            assert run(store, judge=lambda: {"multilabel_map": 0.5}).written == 0
        assert [note.get("multilabel_map") for note in notes(store)] == [None, None, 0.5]
        assert len(notes(store, "hflip")) == 2

    def test_the_summary_names_command_and_source(self, store: Path) -> None:
        run(store)
        catalog = read_catalog(store)
        summary = summarise(catalog, [], verified=False)
        assert summary["status"] == "complete"
        assert summary["teachers"]["clip_plain"]["command"] == COMMAND.replace("STORE", str(store))
        assert summary["teachers"]["clip"]["command"] is None
        (array,) = [array for array in summary["arrays"] if array["path"] == "clip_plain/hflip/logits"]
        assert array["source"] == catalog.fingerprints["clip/hflip/embeddings"]


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Interrupt the commit of one shard more of the new logits."""
    write_shard = ZarrArray.write_shard
    done = [0]

    def write(self: ZarrArray, shard: int, data: NDArray[np.generic], rank: int) -> Any:
        if self.layout.path.startswith("clip_plain/") and self.layout.path.endswith("/logits"):
            done[0] += 1
            if done[0] > shards:
                raise KeyboardInterrupt
        return write_shard(self, shard, data, rank)

    monkeypatch.setattr(ZarrArray, "write_shard", write)


KILLS = """
import numpy as np

conftest = runpy.run_path(sys.argv[1])
from cache.catalog import read_catalog
from cache.relabel import RelabelRequest, relabel

text = np.arange(24, dtype=np.float32).reshape(4, 6)


def build(name):
    asked = RelabelRequest("clip", "new", {"spec": "clip"}, text, 100.0, None, {"command": "c"})
    relabel(read_catalog(stores.folder / name), asked)


forked(lambda: stores.build(stores.plan(4, teachers=["clip"])))
for name in ("whole", "counted"):
    shutil.copytree(stores.folder / "store.zarr", stores.folder / name)
forked(lambda: build("whole"))
whole = conftest["tree"](stores.folder / "whole")
killed, num_steps = 0, number_of_steps(lambda: build("counted"))
for last in random.Random(0).sample(range(1, num_steps + 1), 6):
    shutil.copytree(stores.folder / "store.zarr", stores.folder / "killed")
    killed += forked(lambda: build("killed"), last=last)
    assert not forked(lambda: build("killed"))
    assert conftest["tree"](stores.folder / "killed") == whole, last
    assert "seconds_all_views" in (stores.folder / "killed/new/hflip/logits/provenance.jsonl").read_text()
    shutil.rmtree(stores.folder / "killed")
print(killed)
"""


class TestResume:
    @pytest.mark.parametrize(("shards", "left"), [(0, 14), (3, 5)])
    def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(
        self, stores: TinyStores, store: Path, tree_of: Tree, monkeypatch: pytest.MonkeyPatch, shards: int, left: int
    ) -> None:
        other = stores.build(name="other.zarr")
        run(other)
        with monkeypatch.context() as patched:
            stop_after(patched, shards)
            with pytest.raises(KeyboardInterrupt):
                run(store)
        catalog = read_catalog(store)
        summary = summarise(catalog, [], verified=False)
        assert (summary["status"], summary["next"]) == ("incomplete", COMMAND.replace("STORE", str(store)))
        assert run(store).written == left
        assert tree_of(store) == tree_of(other)

    def test_killed_runs_are_resumed(self, tmp_path: Path) -> None:
        assert run_killing(tmp_path, KILLS) == [6]

    def test_a_complete_store_is_not_touched(self, store: Path) -> None:
        def state() -> dict[Path, tuple[int, int]]:
            return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in store.rglob("*")}

        run(store)
        before = state()
        assert run(store).written == 0
        assert state() == before

    def test_the_text_embeddings_of_an_earlier_run_are_taken(self, store: Path) -> None:
        asked = request()
        catalog = read_catalog(store)
        assert stored_text_embeddings(catalog, "clip_plain", asked.identity, repair=False) is None
        run(store)
        found = stored_text_embeddings(read_catalog(store), "clip_plain", asked.identity, repair=False)
        np.testing.assert_array_equal(found, TEXT)

    def test_damaged_shards_and_text_embeddings_are_mended(self, store: Path, tree_of: Tree) -> None:
        run(store)
        whole = tree_of(store)
        for damaged in ("clip_plain/hflip/logits/c/1/0", "clip_plain/text_embeddings/c/0/0"):
            data = bytearray(whole[damaged])
            data[0] ^= 1
            (store / damaged).write_bytes(data)
        assert not is_sound(store)
        catalog = read_catalog(store)
        with pytest.raises(StoreCorruptError, match="text_embeddings"):
            stored_text_embeddings(catalog, "clip_plain", request().identity, repair=False)
        assert stored_text_embeddings(catalog, "clip_plain", request().identity, repair=True) is None
        done = run(store, repair=True)
        assert [(r.array, r.shard, r.same_bytes) for r in done.repairs] == [("clip_plain/hflip/logits", 1, True)]
        assert tree_of(store) == whole


class TestSource:
    def test_the_only_teacher_that_can_be_is_found_also_beside_its_own_logits(self, store: Path) -> None:
        assert find_source(read_catalog(store), None).manifest.key == "clip"
        run(store)
        assert find_source(read_catalog(store), None).manifest.key == "clip"
        assert find_source(read_catalog(store), "clip").manifest.key == "clip"

    def test_what_cannot_be_relabelled_is_a_usage_error_that_lists_what_can(self, store: Path) -> None:
        run(store)
        catalog = read_catalog(store)
        for key, message, hint in (
            ("vit", "no teacher 'vit' in this store", None),
            ("dino", "teacher dino has no embeddings to make logits from", None),
            ("clip_plain", "teacher clip_plain has no embeddings", "its logits were made from clip: --teacher clip"),
        ):
            with pytest.raises(UsageError) as caught:
                find_source(catalog, key)
            assert caught.value.message.startswith(f"{store}: {message}")
            assert caught.value.message.endswith("(those that can be relabelled: clip)")
            assert caught.value.hint == hint

    def test_several_or_none_ask_for_a_choice(self, stores: TinyStores) -> None:
        other = renamed(stores, "clip-b", {"spec": "b"})
        store = stores.build(stores.plan(teachers=["clip", other]))
        with pytest.raises(
            UsageError, match=r"2 teachers can be relabelled: clip, clip-b\n  next: choose one: --teacher"
        ):
            find_source(read_catalog(store), None)
        without = stores.build(stores.plan(teachers=["dino"]), "without.zarr")
        with pytest.raises(UsageError, match=r"embeddings of images and of prompts, found none \(teachers: dino\)"):
            find_source(read_catalog(without), None)
        empty = stores.build(dataclasses.replace(stores.plan(), teachers=[]), "empty.zarr")
        with pytest.raises(UsageError, match=r"found none \(teachers: none\)\n  next: extract one first: python cli"):
            find_source(read_catalog(empty), None)

    def test_missing_embeddings_are_named_with_the_command_that_writes_them(self, stores: TinyStores) -> None:
        store = stores.build(stores.plan(teachers=["clip"]), limit=2)
        catalog = read_catalog(store)
        with pytest.raises(StoreIncompleteError) as caught:
            refuse_source(catalog, catalog.teachers["clip"], "new")
        assert caught.value.message.splitlines()[1:] == [
            "  clip/original/embeddings: 4 of 7 missing",
            "  clip/hflip/embeddings: 4 of 7 missing",
        ]
        assert caught.value.hint is not None
        assert "python cli.py extract-teachers --voc-root DIR --voc-set 2007:train --teacher clip " in caught.value.hint

    def test_features_that_are_missing_do_not_matter(self, store: Path) -> None:
        for missing in ("dino/original/features", "clip/original/logits"):
            (store / missing / "ledger.jsonl").unlink()
        catalog = read_catalog(store)
        refuse_source(catalog, catalog.teachers["clip"], "new")
        assert run(store).written == 14

    def test_the_key_of_an_extracted_teacher_is_a_usage_error(self, store: Path) -> None:
        run(store)
        catalog = read_catalog(store)
        for key in ("clip", "dino"):
            with pytest.raises(UsageError, match=rf"{key} is a teacher of this store that relabel-logits did not make"):
                refuse_source(catalog, catalog.teachers["clip"], key)
        refuse_source(catalog, catalog.teachers["clip"], "clip_plain")

    def test_an_hdf5_store_names_the_conversion_to_one_that_takes_more(self, stores: TinyStores) -> None:
        store = stores.build(name="my store.h5")
        catalog = read_catalog(store)
        with pytest.raises(StoreWriteError) as caught:
            refuse_source(catalog, catalog.teachers["clip"], "new")
        assert caught.value.message == f"{store}: an HDF5 store takes no further teacher, and new is not in it"
        assert caught.value.hint is not None
        words = shlex.split(caught.value.hint.partition("that one: ")[2])
        assert words == ["python", "cli.py", "convert-cache", str(store), str(store.with_suffix(".zarr"))]


class TestRefusals:
    def test_another_identity_is_named_field_by_field(self, store: Path) -> None:
        catalog = read_catalog(store)
        source = catalog.teachers["clip"]
        refuse_other_identity(catalog, source, {**IDENTITY, "prompts": ["any"]}, but=("prompts",))
        with pytest.raises(StoreStaleError) as caught:
            refuse_other_identity(catalog, source, {**IDENTITY, "spec": "clip_b", "layer": 3}, but=())
        assert caught.value.message.splitlines()[1:] == [
            "  clip.layer: stored null, found 3",
            "  clip.spec: stored clip, found clip_b",
        ]
        assert caught.value.hint is not None
        assert "--weights clip=PATH" in caught.value.hint
        many = {f"field_{n:02}": "x" * 200 for n in range(12)}
        with pytest.raises(StoreStaleError, match=r"… and 4 more") as caught:
            refuse_other_identity(catalog, source, {**IDENTITY, **many}, but=())
        assert max(map(len, caught.value.message.splitlines()[1:])) < 160

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"identity": {**IDENTITY, "prompts": ["other"]}}, r"clip_plain\.prompts: stored \[\"plain\"\], found"),
            ({"source": "clip-b"}, r"clip_plain\.original\.arrays\.logits\.source: stored \w+, found \w+"),
        ],
        ids=["other prompts", "other embeddings"],
    )
    def test_another_teacher_under_the_key_is_refused_and_nothing_is_touched(
        self, stores: TinyStores, tree_of: Tree, changes: dict[str, Any], field: str
    ) -> None:
        other = renamed(stores, "clip-b", {"spec": "b"})
        store = stores.build(stores.plan(teachers=["clip", other]))
        run(store)
        before = tree_of(store)
        with pytest.raises(StoreStaleError, match=field) as caught:
            run(store, **changes)
        assert "relabel-logits made these logits" in str(caught.value)
        assert "--as KEY" in str(caught.value)
        assert tree_of(store) == before

    def test_other_prompts_are_refused_before_a_teacher_is_built(self, store: Path) -> None:
        run(store)
        with pytest.raises(StoreStaleError, match=r"clip_plain\.prompts: stored"):
            stored_text_embeddings(read_catalog(store), "clip_plain", {**IDENTITY, "prompts": []}, repair=False)

    def test_a_value_that_is_not_finite_names_its_image(self, stores: TinyStores) -> None:
        store = stores.build(stores.plan(teachers=["clip"]))
        message = re.escape("clip_plain/original/logits: VOC2007/000001 (sample 0) has values that are not finite")
        with np.errstate(over="ignore"), pytest.raises(StoreWriteError, match=message):
            run(store, logit_scale=1e39)


class TestElsewhere:
    def test_a_copy_has_the_very_bytes(self, stores: TinyStores, store: Path, tree_of: Tree) -> None:
        run(store)
        copy = convert(ConvertRequest(store, stores.folder / "out.zarr", "c")).out
        assert tree_of(copy) == tree_of(store)
        smaller = convert(ConvertRequest(store, stores.folder / "small.zarr", "c", dtype="int8")).out
        of_logits = {path: data for path, data in tree_of(store).items() if path.startswith("clip_plain/")}
        assert of_logits.items() < tree_of(smaller).items()
        alone = convert(ConvertRequest(store, stores.folder / "one.zarr", "c", teachers=("clip_plain",))).out
        assert is_sound(alone)

    def test_an_hdf5_copy_has_them_and_is_complete(self, stores: TinyStores, store: Path) -> None:
        run(store)
        copy = convert(ConvertRequest(store, stores.folder / "copy.h5", "c")).out
        assert is_sound(copy)
        for view in VIEWS:
            np.testing.assert_array_equal(logits(copy, view), logits(store, view))
        catalog = read_catalog(copy)
        refuse_source(catalog, catalog.teachers["clip"], "clip_plain")
        assert run(copy).written == 0

    def test_extracting_the_same_under_its_key_is_refused(self, stores: TinyStores, store: Path) -> None:
        run(store)
        made = renamed(stores, "clip_plain", {**IDENTITY, "prompts": ["plain"]}, outputs={"logits": (4,)})
        with pytest.raises(StoreStaleError, match=r"logits\.source: stored \w+, found null") as caught:
            stores.build(stores.plan(teachers=[made]), store.name)
        assert "extract-teachers: --teacher KEY=SPEC" in str(caught.value)
