"""Stores of images: how they lie on disk, what is refused, and what is told of them."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from cache.catalog import read_catalog
from cache.convert import convert
from cache.derive import ConvertRequest
from cache.image_arrays import StoredImages, is_image_store
from cache.layout import sample_array
from cache.manifest import StoredArray, ViewLayout, ViewManifest
from cache.plan import StorePlan, TeacherPlan, array_dtype
from cache.reader import TeacherStore
from cache.selection import Selection
from cache.summary import summarise
from cache.training_gaps import find_gaps
from cache.verify import find_problems, read_ledgers
from cache.writer import open_writer, refuse_other_images
from data.errors import StoreCorruptError, StoreIncompleteError, StoreStaleError, UsageError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

ROOT = Path(__file__).parents[2]
SHAPE = (4, 6, 3)
ARRAY = "frames/original/images"
FRAMES = TeacherPlan("frames", {"decoder": "none"}, False, np.ones(4, "<f4"), {"images": SHAPE})


def pixels(rows: range | list[int]) -> NDArray[np.uint8]:
    """What the images of these rows are: every byte value occurs, the fill value 0 among them."""
    return np.stack([np.random.default_rng(row).integers(0, 256, SHAPE) for row in rows]).astype(np.uint8)


def image_plan(stores: TinyStores, **changes: Any) -> StorePlan:
    return stores.plan(teachers=[FRAMES], views=("original",), **{"feature_dtype": "float32", **changes})


def build(stores: TinyStores, name: str = "images.zarr", limit: int | None = None, **changes: Any) -> Path:
    with open_writer(stores.folder / name, image_plan(stores, **changes)) as writer:
        for missing in writer.missing()[:limit]:
            images: dict[str, Any] = {"images": pixels(range(missing.first, missing.first + missing.count))}
            writer.commit(missing, images)
    return stores.folder / name


@pytest.fixture
def store(stores: TinyStores) -> Path:
    return build(stores)


def opened(store: Path) -> StoredImages:
    teacher_store = TeacherStore(store)
    samples = teacher_store.catalog.samples
    rows = {sample.id: row for row, sample in enumerate(samples)}
    reader = teacher_store.array("frames", "original", "images")
    return StoredImages(store, reader, rows, {sample.id: sample.sha256 for sample in samples})


def damage(store: Path, row: int = 4) -> None:
    """Turn one bit of a row's image. Shards hold three images of 72 bytes, each with a checksum of 4."""
    path = store / ARRAY / f"c/{row // 3}/0/0/0"
    data = bytearray(path.read_bytes())
    data[row % 3 * 76 + 5] ^= 1
    path.write_bytes(data)


class TestOnDisk:
    def test_an_image_is_an_inner_chunk_with_four_bytes_of_checksum(self) -> None:
        layout = sample_array(ARRAY, 130, (480, 480, 3), "uint8", 64)
        assert layout.sample_bytes == 480 * 480 * 3 == 691_200
        assert layout.shard_file_bytes(0) == 64 * (691_200 + 4) + 64 * 16 + 4
        assert layout.shard_file_bytes(2) == 2 * (691_200 + 4) + 64 * 16 + 4
        assert layout.dimensions == ("sample", "row", "column", "rgb")

    def test_its_files_are_those_that_zarr_python_writes(self, store: Path, tmp_path: Path) -> None:
        theirs = zarr.create_array(
            tmp_path / "theirs",
            shape=(7, *SHAPE),
            dtype="uint8",
            chunks=(1, *SHAPE),
            shards=(3, *SHAPE),
            serializer=BytesCodec(endian=None),
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            dimension_names=("sample", "row", "column", "rgb"),
            config={"write_empty_chunks": True},
        )
        theirs[...] = pixels(range(7))
        ours, theirs_folder = store / ARRAY, tmp_path / "theirs"
        assert json.loads((ours / "zarr.json").read_text()) == json.loads((theirs_folder / "zarr.json").read_text())
        for shard in range(3):
            name = f"c/{shard}/0/0/0"
            assert (ours / name).read_bytes() == (theirs_folder / name).read_bytes()

    @pytest.mark.parametrize("name", ["images.zarr", "images.h5"])
    def test_every_byte_is_read_back_from_either_container(self, stores: TinyStores, name: str) -> None:
        store = build(stores, name)
        found = TeacherStore(store).array("frames", "original", "images").gather(range(7))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels(range(7)))
        assert find_problems(read_catalog(store), verify=True) == []

    def test_another_reader_sees_the_images(self, store: Path) -> None:
        found = zarr.open_array(store / ARRAY, mode="r")
        np.testing.assert_array_equal(np.asarray(found[...]), pixels(range(7)))

    def test_a_plan_counts_one_byte_a_value(self, stores: TinyStores) -> None:
        assert image_plan(stores).planned_bytes() == 7 * 72
        dtypes = {name: array_dtype(name, "float16") for name in ("images", "features", "logits", "moments")}
        assert dtypes == {"images": "uint8", "features": "float16", "logits": "float32", "moments": "float32"}

    def test_floats_are_refused_rather_than_cut_to_bytes(self, stores: TinyStores) -> None:
        with open_writer(stores.folder / "images.zarr", image_plan(stores)) as writer:
            missing = writer.missing()[0]
            with pytest.raises(ValueError, match=r"expected \(3, 4, 6, 3\) uint8, found \(3, 4, 6, 3\) float32"):
                writer.commit(missing, {"images": np.full((3, *SHAPE), 300, np.float32)})

    def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(
        self, stores: TinyStores, store: Path, tree_of: Callable[[Path], dict[str, bytes]]
    ) -> None:
        build(stores, "other.zarr", limit=1)
        assert tree_of(build(stores, "other.zarr")) == tree_of(store)


REFUSED: dict[str, tuple[dict[str, tuple[tuple[int, ...], str]], str]] = {
    "images beside features": ({"images": (SHAPE, "uint8"), "logits": ((4,), "float32")}, "alone in their view"),
    "four channels": ({"images": ((4, 6, 4), "uint8")}, "with three channels"),
    "images of another dtype": ({"images": (SHAPE, "float32")}, "images are uint8, and nothing else is"),
    "logits of bytes": ({"logits": ((4,), "uint8")}, "images are uint8, and nothing else is"),
    "an axis too few": ({"images": ((4, 3), "uint8")}, "expected axes"),
}


@pytest.mark.parametrize(("arrays", "message"), REFUSED.values(), ids=REFUSED)
def test_a_view_that_cannot_be_is_refused(arrays: dict[str, tuple[tuple[int, ...], Any]], message: str) -> None:
    stored = {name: StoredArray(sample_shape=s, dtype=d, fingerprint="") for name, (s, d) in arrays.items()}
    with pytest.raises(ValueError, match=message):
        ViewManifest(view="original", arrays=stored, layout=ViewLayout(shard_samples=3, batch_size=1))


class TestReading:
    def test_images_are_found_by_id_and_cannot_be_changed(self, store: Path) -> None:
        images = opened(store)
        for row, image_id in enumerate(images.digests):
            np.testing.assert_array_equal(images.read(image_id), pixels([row])[0])
            assert not images.read(image_id).flags.writeable

    def test_what_is_not_committed_is_refused_not_black(self, stores: TinyStores) -> None:
        images = opened(build(stores, limit=1))
        images.read("VOC2007/000003")
        with pytest.raises(StoreIncompleteError, match=r"samples 3 … 5 \(shard 1\) are not committed"):
            images.read("VOC2007/000004")

    def test_a_damaged_image_is_refused_by_name_with_the_next_command(self, store: Path) -> None:
        damage(store)
        images = opened(store)
        images.read("VOC2007/000004")
        with pytest.raises(StoreCorruptError) as caught:
            images.read("VOC2007/000005")
        assert caught.value.message == f"{store}: {ARRAY}: shard 1, sample 4: checksum fails (VOC2007/000005)"
        assert str(caught.value.hint).endswith(shlex.join(["rm", "-r", str(store)]))

    def test_it_travels_small_and_reads_on(self, stores: TinyStores) -> None:
        images = opened(build(stores, name="many.zarr", limit=1, num_samples=500))
        images.read("VOC2007/000001")
        sent = pickle.dumps(images)
        assert len(sent) < 500 * 30  # ids and rows, but no digest of 64 characters
        again: StoredImages = pickle.loads(sent)
        np.testing.assert_array_equal(again.read("VOC2007/000002"), pixels([1])[0])

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_other_processes_read_it(self, store: Path, method: str, tmp_path: Path) -> None:
        (tmp_path / "images.pickle").write_bytes(pickle.dumps(opened(store)))
        script = (
            "import multiprocessing, pickle, sys\n"
            "from pathlib import Path\n"
            "def total(images): return int(images.read('VOC2007/000003').sum())\n"
            "if __name__ == '__main__':\n"
            "    images = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
            "    images.read('VOC2007/000003')\n"
            "    with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:\n"
            "        print(*pool.map(total, [images] * 4))\n"
        )
        (tmp_path / "read.py").write_text(script)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "read.py"), str(tmp_path / "images.pickle"), method],
            capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(pixels([2]).sum())] * 4


class TestTold:
    def test_verify_names_the_damaged_image_and_its_shard(self, store: Path) -> None:
        damage(store)
        catalog = read_catalog(store)
        assert find_problems(catalog, verify=False) == []
        (problem,) = find_problems(catalog, verify=True)
        assert (problem.array, problem.shard, problem.sample) == (ARRAY, 1, 4)
        assert problem.problem == "the sample fails its checksum (VOC2007/000005)"

    def test_a_whole_store_says_what_it_holds_and_how_to_train_from_it(self, store: Path) -> None:
        summary = summarise(read_catalog(store), [], verified=False)
        assert (summary["status"], summary["holds"]) == ("complete", "images")
        assert summary["next"] == f"python cli.py train … --cache-images {shlex.quote(str(store))}"
        (array,) = summary["arrays"]
        assert (array["dtype"], array["float32_bytes"], array["mean"], array["outliers"]) == ("uint8", 0, None, None)
        assert summary["cost"] is None

    def test_a_store_of_targets_says_so_too(self, whole_store: Path) -> None:
        assert summarise(read_catalog(whole_store), [], verified=False)["holds"] == "targets"

    def test_an_unfinished_store_is_finished_by_training(self, stores: TinyStores) -> None:
        summary = summarise(read_catalog(build(stores, limit=1)), [], verified=False)
        assert (summary["status"], summary["arrays"][0]["missing"]) == ("incomplete", 4)
        assert summary["next"].startswith("python cli.py train ")

    def test_a_damaged_store_is_removed_and_made_again(self, store: Path) -> None:
        damage(store)
        catalog = read_catalog(store)
        summary = summarise(catalog, find_problems(catalog, verify=True), verified=True)
        assert summary["status"] == "corrupt"
        assert summary["next"].startswith(f"{shlex.join(['rm', '-r', str(store)])} && python cli.py train ")
        assert "--repair" not in summary["next"]

    def test_nothing_is_missed_of_teachers(self, store: Path) -> None:
        catalog = read_catalog(store)
        assert find_gaps(catalog, read_ledgers(catalog)) == []

    def test_another_frame_is_told(self, stores: TinyStores) -> None:
        catalog = read_catalog(build(stores, frame=(320, 640)))
        (gap,) = find_gaps(catalog, read_ledgers(catalog))
        assert gap.problem == "its frame is 320×640, students see 480×480"


class TestRefused:
    def test_training_targets_are_not_read_from_it(self, store: Path, whole_store: Path) -> None:
        with pytest.raises(UsageError, match="an image store holds decoded images, no teacher's targets") as caught:
            Selection([TeacherStore(whole_store), TeacherStore(store)], ["VOC2007/000001"])
        assert caught.value.hint == (
            f"give it as --cache-images {store}, and a store that extract-teachers made as --cached-teachers"
        )

    def test_there_is_nothing_to_convert(self, store: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="an image store holds decoded images, not targets: there is nothing to"):
            convert(ConvertRequest(store, tmp_path / "out.zarr", "python cli.py convert-cache A B"))
        assert not (tmp_path / "out.zarr").exists()

    def test_images_do_not_come_into_a_store_of_targets(self, stores: TinyStores, whole_store: Path) -> None:
        copy = Path(shutil.copytree(whole_store, stores.folder / "copy.zarr"))
        with (
            pytest.raises(StoreStaleError, match="expected a store of decoded images, found one of teachers' targets"),
            open_writer(copy, image_plan(stores)),
        ):
            pass
        assert not (copy / "frames").exists()

    def test_targets_do_not_come_into_a_store_of_images(self, stores: TinyStores, store: Path) -> None:
        match = "expected a store of teachers' targets, found one of decoded images"
        with pytest.raises(StoreStaleError, match=match), open_writer(store, stores.plan()):
            pass
        with pytest.raises(StoreStaleError, match=match):  # before any teacher is built
            refuse_other_images(store, replace(stores.plan(), teachers=()))
        assert is_image_store(read_catalog(store))
