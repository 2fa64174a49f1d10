"""zarr-python and tensorstore as referees: the same metadata, the same bytes, the same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.errors import ZarrUserWarning

from cache.catalog import read_catalog
from cache.layout import ArrayLayout, constant_array, sample_array
from cache.reader import TeacherStore
from cache.zarr_storage import ZarrArray

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def zarr_array(folder: Path, layout: ArrayLayout) -> zarr.Array[Any]:
    """The array as zarr-python itself would create it."""
    shard = (layout.shard_samples, *layout.sample_shape)
    return zarr.create_array(
        folder,
        shape=layout.shape,
        dtype=layout.dtype,
        chunks=layout.chunk_shape,
        shards=shard if layout.sharded else None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=-128 if layout.dtype == "int8" else np.nan,
        dimension_names=layout.dimensions,
        config={"write_empty_chunks": True},
    )


def write_ours(folder: Path, layout: ArrayLayout, values: np.ndarray[Any, Any]) -> None:
    storage = ZarrArray(folder, layout)
    for shard in range(layout.num_shards):
        first, count = layout.shard_range(shard)
        (storage.folder / layout.shard_folder(shard)).mkdir(parents=True)
        storage.write_shard(shard, values[first : first + count], rank=0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def random_values(layout: ArrayLayout) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=layout.shape).astype(layout.numpy_dtype)


FEATURES = {
    "several shards, the last partial": sample_array("t/v/features", 7, (3, 2, 5), "float16", 3),
    "an exact multiple": sample_array("t/v/features", 6, (2, 2, 3), "float16", 3),
    "one sample": sample_array("t/v/features", 1, (2, 2, 3), "float16", 64),
    "fewer samples than a shard": sample_array("t/v/features", 5, (2, 2, 3), "float32", 64),
    "one sample a shard": sample_array("t/v/features", 3, (1, 1, 1), "float16", 1),
}
SMALL = {
    "logits, the last chunk padded": sample_array("t/v/logits", 7, (20,), "float32", 3),
    "logits, one sample": sample_array("t/v/logits", 1, (20,), "float32", 64),
    "moments": sample_array("t/v/moments", 6, (2, 5), "float32", 3),
    "embeddings, fewer than a shard": sample_array("t/v/embeddings", 4, (6,), "float32", 5),
    "scales of tokens": sample_array("t/v/scale_token", 5, (2, 3), "float32", 3),
    "text embeddings": constant_array("t", "text_embeddings", (20, 6)),
    "a PCA basis": constant_array("t", "pca", (5, 8)),
}
LAYOUTS = {**FEATURES, **SMALL}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_arrays_files_are_those_that_zarr_python_writes(layout: ArrayLayout, tmp_path: Path) -> None:
    values = random_values(layout)
    write_ours(tmp_path / "ours", layout, values)
    zarr_array(tmp_path / "theirs", layout)[...] = values
    theirs = files_of(tmp_path / "theirs")
    assert json.loads(theirs.pop("zarr.json")) == layout.metadata()
    assert files_of(tmp_path / "ours" / layout.path) == theirs


@settings(max_examples=25)
@given(
    num_samples=st.integers(1, 9),
    shard_samples=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    sharded=st.booleans(),
)
def test_any_geometry_gives_the_files_that_zarr_python_writes(
    tmp_path_factory: pytest.TempPathFactory,
    num_samples: int,
    shard_samples: int,
    grid: tuple[int, ...],
    dtype: str,
    sharded: bool,
) -> None:
    kind, shape = ("features", grid) if sharded or dtype == "int8" else ("logits", grid[2:])
    layout = sample_array(f"t/v/{kind}", num_samples, shape, dtype, shard_samples)
    folder = tmp_path_factory.mktemp("geometry")
    test_an_arrays_files_are_those_that_zarr_python_writes(layout, folder)
    theirs = zarr.open_array(folder / "theirs", mode="r")
    assert theirs.shape == layout.shape


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_metadata_file_of_a_store_is_what_zarr_python_would_write(
    stores: TinyStores, dtype: str, tmp_path: Path
) -> None:
    store = stores.build(stores.plan(feature_dtype=dtype))
    catalog = read_catalog(store)
    text = catalog.teachers["clip"].constants["text_embeddings"]
    groups = ["", *(f"{key}{view}" for key in catalog.teachers for view in ("", "/original", "/hflip"))]
    layouts = {layout.path: layout for layout in [*catalog.layouts(), text]}
    found = {str(p.parent.relative_to(store)).removeprefix(".") for p in store.rglob("zarr.json")}
    assert found == {*groups, *layouts}
    for number, path in enumerate(sorted(found)):
        ours = json.loads((store / path / "zarr.json").read_bytes())
        folder = tmp_path / "zarr" / str(number)
        if path in layouts:
            zarr_array(folder, layouts[path])
        else:
            zarr.create_group(folder, attributes=ours["attributes"])
        assert ours == json.loads((folder / "zarr.json").read_bytes()), path


def test_zarr_python_reads_every_array_of_a_store(whole_store: Path) -> None:
    store = TeacherStore(whole_store)
    root = zarr.open_group(whole_store, mode="r")
    for layout in store.catalog.layouts():
        teacher, view, name = layout.path.split("/")
        ours = store.array(teacher, view, name).gather(range(layout.num_samples))  # type: ignore[arg-type]
        np.testing.assert_array_equal(root[layout.path][...], ours)
    np.testing.assert_array_equal(root["clip/text_embeddings"][...], store.text_embeddings("clip"))
    assert root.attrs["teachonce"]["format_version"] == 1


def test_zarr_python_warns_of_samples_jsonl_when_it_lists_the_root_and_of_nothing_else(whole_store: Path) -> None:
    root = zarr.open_group(whole_store, mode="r")
    with pytest.warns(ZarrUserWarning, match=r"samples\.jsonl is not recognized") as caught:
        assert {name for name, _ in root.members()} == {"clip", "dino"}
    assert len(caught) == 1
    for teacher in ("clip", "dino"):
        list(root[teacher].members(max_depth=None))  # warnings are errors: there is none


def test_tensorstore_reads_every_array_of_a_store(whole_store: Path) -> None:
    store = TeacherStore(whole_store)
    for layout in store.catalog.layouts():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(whole_store / layout.path)}}
        theirs = tensorstore.open(spec, read=True).result().read().result()
        teacher, view, name = layout.path.split("/")
        ours = store.array(teacher, view, name).gather(range(layout.num_samples))  # type: ignore[arg-type]
        np.testing.assert_array_equal(theirs, ours)
