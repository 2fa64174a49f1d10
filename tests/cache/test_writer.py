from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import cache.writer
import cache.zarr_storage
from cache.catalog import read_catalog
from cache.encoding import feature_moments
from cache.ledger import read_ledgers
from cache.plan import StorePlan
from cache.reader import TeacherStore
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreCorruptError, StoreLockedError, StoreMissingError, StoreWriteError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

Tree = Callable[[Path], dict[str, bytes]]


def committed(store: Path, array: str) -> list[int]:
    return sorted(read_ledgers(store / array)[0])


def is_clean(folder: Path) -> bool:
    """No leftover of any kind below or beside the stores of a folder."""
    bad = (".tmp-", ".new-", "ledger-", ".lock.json", "ledger.jsonl.tmp")
    return not [path for path in folder.rglob("*") if any(part in path.name for part in bad)]


class TestCreate:
    def test_a_new_store_lacks_everything_shard_by_shard(self, stores: TinyStores) -> None:
        with open_writer(stores.folder / "store.zarr", stores.plan()) as writer:
            missing = writer.missing()
        found = [(m.first, m.count, m.teacher, m.view) for m in missing]
        targets = [(key, view) for key in ("dino", "clip") for view in ("original", "hflip")]
        assert found == [(first, count, *target) for first, count in ((0, 3), (3, 3), (6, 1)) for target in targets]
        assert missing[0].arrays == ("moments", "features")
        assert missing[2].arrays == ("logits", "embeddings")

    def test_a_created_store_is_readable_and_sound_before_anything_is_committed(self, stores: TinyStores) -> None:
        store = stores.build(limit=0)
        assert find_problems(read_catalog(store), verify=True) == []
        assert TeacherStore(store).array("dino", "original", "features").num_missing == 7
        assert TeacherStore(store).text_embeddings("clip").shape == (4, 6)

    def test_nothing_but_the_store_and_its_lock_is_left(self, stores: TinyStores) -> None:
        stores.build()
        assert is_clean(stores.folder)
        assert sorted(path.name for path in stores.folder.iterdir()) == ["store.zarr", "store.zarr.lock"]

    def test_missing_parents_are_made(self, stores: TinyStores) -> None:
        assert (stores.build(name="a/b/store.zarr") / "zarr.json").is_file()

    def test_an_empty_folder_becomes_the_store(self, stores: TinyStores) -> None:
        (stores.folder / "store.zarr").mkdir()
        assert find_problems(read_catalog(stores.build()), verify=True) == []

    def test_two_runs_write_the_same_bytes(self, stores: TinyStores, tree_of: Tree) -> None:
        assert tree_of(stores.build(name="a.zarr")) == tree_of(stores.build(name="b.zarr"))

    def test_something_else_at_the_path_is_left_alone(self, stores: TinyStores) -> None:
        path = stores.folder / "store.zarr"
        path.write_bytes(b"a file")
        with pytest.raises(StoreWriteError, match="something that is not a store is already there"):
            stores.build()
        assert path.read_bytes() == b"a file"
        path.unlink()
        path.mkdir()
        (path / "notes.txt").write_bytes(b"x")
        with pytest.raises(StoreWriteError, match="something that is not a store is already there"):
            stores.build()
        assert [entry.name for entry in path.iterdir()] == ["notes.txt"]
        assert is_clean(stores.folder)

    def test_a_store_behind_a_link_is_the_same_store_with_the_same_lock(self, stores: TinyStores) -> None:
        (stores.folder / "disk").mkdir()
        link = stores.folder / "link.zarr"
        link.symlink_to(stores.folder / "disk" / "store.zarr")
        store = stores.build(stores.plan(teachers=["dino"]), "disk/store.zarr")
        stores.build(name="link.zarr")
        assert link.is_symlink()
        assert sorted(read_catalog(store).teachers) == ["clip", "dino"]
        assert not (stores.folder / "link.zarr.lock").exists()
        with open_writer(store, stores.plan()), pytest.raises(StoreLockedError):
            stores.build(name="link.zarr")

    def test_a_zarr_group_of_others_is_left_alone(self, stores: TinyStores) -> None:
        path = stores.folder / "store.zarr"
        path.mkdir()
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        with pytest.raises(StoreMissingError, match="not of a TeachOnce store"):
            stores.build()

    @pytest.mark.parametrize("path", [".", "..", "/", "a/.."])
    def test_a_path_without_a_name_is_refused(self, stores: TinyStores, path: str) -> None:
        with (
            pytest.raises(StoreWriteError, match="expected a folder to create"),
            open_writer(Path(path), stores.plan()),
        ):
            pass

    def test_a_disk_that_is_too_small_is_said_before_anything_is_made(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = stores.plan()
        # features 30 × 2 bytes, moments 10 × 4, logits 4 × 4, embeddings 6 × 4; two views, seven samples
        assert plan.planned_bytes() == (60 + 40 + 16 + 24) * 2 * 7
        usage = shutil.disk_usage(stores.folder)
        monkeypatch.setattr(cache.writer.shutil, "disk_usage", lambda _: usage._replace(free=1959))
        with pytest.raises(StoreWriteError, match=r"needs 0\.00\d MB, but"):
            stores.build(plan)
        assert not (stores.folder / "store.zarr").exists()

    def test_a_disk_that_is_too_small_for_what_is_missing_is_said_before_anything_is_written(
        self, stores: TinyStores, tree_of: Tree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = stores.folder / "s.zarr"
        with open_writer(path, stores.plan(teachers=["dino"])) as writer:
            stores.fill(writer)
        before = tree_of(path)
        # clip adds, a view and shard of three samples, logits 3 × 4 × 4 + 4 and embeddings 3 × 6 × 4 + 4 bytes.
        need = 2 * 3 * (52 + 76)
        usage = shutil.disk_usage(stores.folder)
        monkeypatch.setattr(cache.writer.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
        with pytest.raises(StoreWriteError, match=r"needs 0\.00\d MB, but"), open_writer(path, stores.plan()):
            pass
        assert {file: data for file, data in tree_of(path).items() if file in before} == before
        monkeypatch.setattr(cache.writer.shutil, "disk_usage", lambda _: usage._replace(free=need))
        with open_writer(path, stores.plan()) as writer:
            stores.fill(writer)

    def test_text_embeddings_that_are_not_finite_are_refused(self, stores: TinyStores) -> None:
        bad = np.full((4, 6), np.nan, np.float32)
        with pytest.raises(StoreWriteError, match="clip/text_embeddings holds values that are not finite"):
            stores.build(stores.plan(teachers=[stores.teacher("clip", text_embeddings=bad)]))
        assert [path.name for path in stores.folder.iterdir()] == ["store.zarr.lock"]


class TestCommit:
    def test_small_arrays_are_committed_before_features(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        real = cache.zarr_storage.append_line
        monkeypatch.setattr(
            cache.zarr_storage, "append_line", lambda path, line: (order.append(path.parent.name), real(path, line))
        )
        stores.build(stores.plan(2, views=["original"]))
        assert order == ["moments", "features", "logits", "embeddings"]

    def test_the_file_is_in_place_and_flushed_before_its_line(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        fsync, rename, write, writev = os.fsync, Path.rename, os.write, os.writev

        def name(descriptor: int) -> str:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            return "tmp" if path.name.startswith(".tmp-") else path.name if path.suffix else f"folder {path.name}"

        with open_writer(stores.folder / "store.zarr", stores.plan(1, teachers=["dino"], views=["original"])) as writer:
            (missing,) = writer.missing()
            monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(f"sync {name(fd)}"), fsync(fd))[1])
            monkeypatch.setattr(Path, "rename", lambda a, b: (steps.append("rename"), rename(a, b))[1])
            monkeypatch.setattr(os, "write", lambda fd, data: (steps.append(f"write {name(fd)}"), write(fd, data))[1])
            monkeypatch.setattr(os, "writev", lambda fd, data: (steps.append(f"write {name(fd)}"), writev(fd, data))[1])
            writer.commit(dataclasses.replace(missing, arrays=("features",)), stores.outputs(missing))
            monkeypatch.undo()
        assert list(dict.fromkeys(steps)) == [
            "write tmp", "sync tmp", "rename", "sync folder 0", "write ledger-0.jsonl", "sync ledger-0.jsonl",
            "sync folder features",
        ]  # fmt: skip

    def test_moments_are_the_sums_of_the_stored_values(self) -> None:
        features = np.random.default_rng(0).normal(2, 3, size=(4, 3, 5, 7)).astype("<f2")
        cells = features.astype(np.float64).reshape(4, 15, 7)
        moments = feature_moments(features)
        assert moments.dtype == np.float32
        np.testing.assert_allclose(moments[:, 0], cells.sum(axis=1), rtol=1e-6)
        np.testing.assert_allclose(moments[:, 1], (cells**2).sum(axis=1), rtol=1e-6)

    @pytest.mark.parametrize(
        ("array", "value"), [("features", np.nan), ("features", np.inf), ("features", 7e4), ("embeddings", -np.inf)]
    )
    def test_a_value_that_is_not_finite_in_the_stored_dtype_is_refused_and_nothing_committed(
        self, stores: TinyStores, array: str, value: float
    ) -> None:
        plan = stores.plan(teachers=["dino" if array == "features" else "clip"], views=["original"])
        with open_writer(stores.folder / "store.zarr", plan) as writer:
            good, bad, _ = writer.missing()
            writer.commit(good, stores.outputs(good))
            outputs = stores.outputs(bad)
            outputs[array][(1, *(0,) * (outputs[array].ndim - 1))] = value
            message = rf"{array}: VOC2007/000005 \(sample 4\) has values that are not finite in float(16|32)"
            with pytest.raises(StoreWriteError, match=message):
                writer.commit(bad, outputs)
        for layout in read_catalog(stores.folder / "store.zarr").layouts():
            assert committed(stores.folder / "store.zarr", layout.path) == [0]
            assert not (stores.folder / "store.zarr" / layout.path / layout.shard_file(1)).exists()

    def test_what_overflows_float16_is_stored_in_float32(self, stores: TinyStores) -> None:
        plan = stores.plan(1, teachers=["dino"], views=["original"], feature_dtype="float32")
        with open_writer(stores.folder / "store.zarr", plan) as writer:
            (missing,) = writer.missing()
            writer.commit(missing, {"features": np.full((1, 3, 2, 5), 7e4, np.float32)})
        assert (TeacherStore(stores.folder / "store.zarr").array("dino", "original", "features").read(0) == 7e4).all()

    def test_outputs_of_another_shape_are_refused(self, stores: TinyStores) -> None:
        with open_writer(stores.folder / "store.zarr", stores.plan(teachers=["dino"])) as writer:
            missing = writer.missing()[0]
            with pytest.raises(ValueError, match=r"shard 0: expected \(3, 3, 2, 5\) float16, found \(3, 2, 3, 5\)"):
                writer.commit(missing, {"features": np.zeros((3, 2, 3, 5), np.float32)})

    def test_a_shard_may_be_committed_from_another_thread(self, stores: TinyStores) -> None:
        with open_writer(stores.folder / "store.zarr", stores.plan()) as writer, ThreadPoolExecutor(1) as behind:
            for done in [behind.submit(writer.commit, m, stores.outputs(m)) for m in writer.missing()]:
                done.result()
        assert find_problems(read_catalog(stores.folder / "store.zarr"), verify=True) == []

    def test_provenance_is_appended_to_every_array_of_the_view(self, stores: TinyStores) -> None:
        with open_writer(stores.folder / "store.zarr", stores.plan()) as writer:
            for device in ("cpu", "gpu"):
                writer.note_provenance("clip", "hflip", {"device": device})
        lines = (stores.folder / "store.zarr/clip/hflip/logits/provenance.jsonl").read_text().splitlines()
        assert [json.loads(line)["device"] for line in lines] == ["cpu", "gpu"]
        assert all(json.loads(line)["time"].endswith("+00:00") for line in lines)
        assert not (stores.folder / "store.zarr/clip/original/logits/provenance.jsonl").exists()


DAMAGE = {
    "missing": (Path.unlink, "committed, but its file is missing"),
    "cut": (lambda path: os.truncate(path, 50), "expected .* bytes, found 50"),
    "index": (lambda path: path.write_bytes(path.read_bytes()[:-9] + bytes(9)), "index fails its checksum"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "expected a regular file"),
}


class TestResume:
    def test_only_what_lacks_is_asked_for(self, stores: TinyStores) -> None:
        store = stores.build(limit=5)
        with open_writer(store, stores.plan()) as writer:
            found = [(m.first, m.teacher, m.view) for m in writer.missing()]
        assert found[:3] == [(3, "dino", "hflip"), (3, "clip", "original"), (3, "clip", "hflip")]
        assert len(found) == 12 - 5

    def test_an_array_that_lacks_a_shard_is_written_alone(self, stores: TinyStores, tree_of: Tree) -> None:
        whole = tree_of(stores.build())
        store = stores.folder / "store.zarr"
        (store / "dino/original/features/ledger.jsonl").unlink()
        before = (store / "dino/original/moments/c/0/0/0").stat().st_mtime_ns
        with open_writer(store, stores.plan()) as writer:
            assert [m.arrays for m in writer.missing()] == [("features",)] * 3
            stores.fill(writer)
        assert tree_of(store) == whole
        assert (store / "dino/original/moments/c/0/0/0").stat().st_mtime_ns == before

    @pytest.mark.parametrize("limit", [0, 1, 5, 11])
    def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(
        self, stores: TinyStores, tree_of: Tree, limit: int
    ) -> None:
        whole = tree_of(stores.build(name="whole.zarr"))
        stores.build(limit=limit)
        assert tree_of(stores.build()) == whole
        assert is_clean(stores.folder)

    def test_a_complete_store_is_not_touched(self, stores: TinyStores) -> None:
        def state() -> dict[Path, tuple[int, int]]:
            return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (stores.folder / "store.zarr").rglob("*")}

        store = stores.build()
        before = state()
        with open_writer(store, stores.plan()) as writer:
            assert writer.missing() == []
        assert state() == before

    def test_leftovers_of_killed_runs_are_swept(self, stores: TinyStores, tree_of: Tree) -> None:
        store = stores.build()
        whole = tree_of(store)
        (store / "dino/original/features/.tmp-0-123-1").write_bytes(b"half")
        (stores.folder / "store.zarr.new-123" / "dino").mkdir(parents=True)
        (stores.folder / "store.zarr.new-old").mkdir()  # not ours
        (stores.folder / "other.zarr.new-123").mkdir()  # of another store
        assert tree_of(stores.build()) == whole
        assert sorted(path.name for path in stores.folder.iterdir()) == [
            "other.zarr.new-123", "store.zarr", "store.zarr.lock", "store.zarr.new-old",
        ]  # fmt: skip

    def test_a_file_without_a_line_is_replaced(self, stores: TinyStores, tree_of: Tree) -> None:
        whole = tree_of(stores.build(name="whole.zarr"))
        store = stores.build(limit=0)
        (store / "dino/original/features/c/0/0/0/0").write_bytes(b"of a killed run")
        assert tree_of(stores.build()) == whole

    def test_what_a_failing_run_committed_is_merged(self, stores: TinyStores) -> None:
        def interrupted() -> None:
            with open_writer(stores.folder / "store.zarr", stores.plan()) as writer:
                stores.fill(writer, limit=4)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert committed(stores.folder / "store.zarr", "clip/hflip/logits") == [0]
        assert is_clean(stores.folder)

    def test_lines_of_another_rank_are_kept(self, stores: TinyStores, tree_of: Tree) -> None:
        store = stores.build()
        whole = tree_of(store)
        folder = store / "clip/original/logits"
        lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "ledger.jsonl").write_bytes(lines[0])
        with open_writer(store, stores.plan()) as writer:
            (folder / "ledger-1.jsonl").write_bytes(b"".join(lines[1:]))
            assert writer.missing()  # it was not there when the store was opened
        assert tree_of(store) == whole

    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_committed_shard_stops_the_run(
        self, stores: TinyStores, damage: Callable[[Path], Any], message: str
    ) -> None:
        store = stores.build()
        damage(store / "dino/original/features/c/1/0/0/0")
        with pytest.raises(StoreCorruptError, match=f"dino/original/features: shard 1: .*{message}"):
            stores.build()

    def test_a_damaged_ledger_stops_the_run(self, stores: TinyStores) -> None:
        path = stores.build() / "dino/original/features/ledger.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"shard":1', b'"shard":2'))
        with pytest.raises(StoreCorruptError, match=r"ledger\.jsonl: line 2 is damaged"):
            stores.build()

    def test_a_second_writer_is_refused_at_once(self, stores: TinyStores) -> None:
        refused = pytest.raises(StoreLockedError, match=f"pid {os.getpid()} on {socket.gethostname()}")
        with open_writer(stores.folder / "store.zarr", stores.plan()), refused:
            stores.build()
        stores.build()


class TestExtend:
    @pytest.mark.parametrize(
        ("first", "then"),
        [
            ({"teachers": ["dino"]}, {"teachers": ["clip"]}),
            ({"teachers": ["dino"]}, {"teachers": ["dino", "clip"]}),
            ({"views": ["original"]}, {"views": ["hflip"]}),
            ({"views": ["original"]}, {"views": ["hflip", "original"]}),
        ],
        ids=["another teacher alone", "a teacher more", "another view alone", "a view more"],
    )
    def test_adding_touches_no_committed_byte(
        self, stores: TinyStores, tree_of: Tree, first: dict[str, Any], then: dict[str, Any]
    ) -> None:
        whole = tree_of(stores.build(name="whole.zarr"))
        store = stores.build(stores.plan(**first))
        files = [path for path in store.rglob("*") if path.is_file()]
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files}
        stores.build(stores.plan(**then))
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files} == before
        assert tree_of(store) == whole
        assert is_clean(stores.folder)

    def test_the_fingerprints_of_what_was_there_stay(self, stores: TinyStores) -> None:
        before = read_catalog(stores.build(stores.plan(teachers=["dino"])))
        after = read_catalog(stores.build())
        assert before.fingerprints.items() <= after.fingerprints.items()
        assert before.fingerprint != after.fingerprint

    def test_the_recorded_batch_size_is_used_again_and_by_a_new_view(self, stores: TinyStores) -> None:
        store = stores.build(stores.plan(teachers=["dino"], views=["original"], batch_size=5))
        with open_writer(store, stores.plan()) as writer:
            assert writer.batch_size("dino", "original") == writer.batch_size("dino", "hflip") == 5
            assert writer.batch_size("clip", "original") == StorePlan.default_batch_size

    def test_nothing_is_added_when_something_else_is_refused(self, stores: TinyStores, tree_of: Tree) -> None:
        store = stores.build(stores.plan(teachers=["dino"], views=["original"]))
        before = tree_of(store)
        changed = stores.teacher("dino", identity={"spec": "other"})
        with pytest.raises(Exception, match="another teacher"):
            stores.build(stores.plan(teachers=["clip", changed]))
        assert tree_of(store) == before


def refusal(build: Callable[[], Path]) -> str | None:
    try:
        build()
    except StoreWriteError as error:
        return str(error)
    return None


class DiskThatFills:
    """Replaces one call of the system: after so many that change something, all refuse."""

    def __init__(self, call: str, allowed: int) -> None:
        self.call = call
        self.real = getattr(os, call)
        self.allowed = allowed

    def __call__(self, *args: Any, **options: Any) -> Any:
        changes = self.call != "open" or args[1] & os.O_CREAT
        self.allowed -= bool(changes)
        if changes and self.allowed < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(*args, **options)


class TestFaults:
    @pytest.mark.parametrize("call", ["write", "fsync", "open", "mkdir", "rename"])
    def test_a_disk_that_refuses_any_call_leaves_a_store_that_resumes(
        self, stores: TinyStores, tree_of: Tree, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        whole = tree_of(stores.build(name="whole.zarr"))
        store = stores.folder / "store.zarr"
        refused = 0
        for allowed in (0, 1, 2, 4, 8, 16, 32, 64, 128):
            with monkeypatch.context() as patch:
                patch.setattr(os, call, DiskThatFills(call, allowed))
                said = refusal(stores.build)
            if said is None:
                break  # it has fewer calls than that
            assert re.search(r"(?s)cannot write: No space left on device.*free some space and run the same", said)
            refused += 1
            if store.exists():
                assert find_problems(read_catalog(store), verify=True) == []
            assert tree_of(stores.build()) == whole
            assert is_clean(stores.folder)
            shutil.rmtree(store)
        assert refused >= 5

    def test_a_line_that_is_written_only_in_part_is_no_commit(
        self, stores: TinyStores, tree_of: Tree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = tree_of(stores.build(name="whole.zarr"))
        real = os.write

        def half(descriptor: int, data: Any) -> int:
            return real(descriptor, data[: len(data) // 2] if bytes(data[:9]) == b'{"bytes":' else data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(StoreWriteError, match="No space left"):
                stores.build()
        assert committed(stores.folder / "store.zarr", "dino/original/moments") == []
        assert tree_of(stores.build()) == whole
