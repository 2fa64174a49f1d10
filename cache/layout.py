"""Where every byte of an array lies: names, shard geometry, file sizes and the Zarr v3 metadata they imply.

Axis legend: N samples, S samples a shard, Gh × Gw patch grid, C channels, K classes, D embedding width, H × W frame.

| array         | [N, …]         | stored as                                                               |
|---------------|----------------|-------------------------------------------------------------------------|
| features      | [N, Gh, Gw, C] | sharded: inner chunk = one sample, index with crc32c at the file's end  |
| logits        | [N, K]         | one chunk = one shard's range, padded with fill in the last             |
| embeddings    | [N, D]         | likewise                                                                |
| moments       | [N, 2, C]      | likewise; each sample's channel sums and sums of squares over its cells |
| scale_channel | [N, C]         | likewise; only for int8 features                                        |
| scale_token   | [N, Gh, Gw]    | likewise; only for int8 features                                        |
| images        | [N, H, W, 3]   | sharded like features; uint8 RGB, the images themselves in the frame    |

A teacher's constants, [K, D] `text_embeddings` and [1 + R, C] `pca` (the mean, then R components), are one chunk each.

Every chunk ends in the crc32c of its payload. There is no compressor: what lies on disk is what is mapped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final

import numpy as np

from cache.canonical import Json, digest

FORMAT_VERSION: Final = 1
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
# Offset and length of an inner chunk that was never written.
ABSENT = np.uint64(2**64 - 1)
TEACHER_KEY = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
RESERVED_KEYS = frozenset({"text_embeddings", "pca", "zarr.json", "samples.jsonl"})
SAMPLES_FILE = "samples.jsonl"
TEXT_EMBEDDINGS = "text_embeddings"
PCA = "pca"

# In the order in which a view's arrays are committed: what is small first, features last.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "moments": ("sample", "moment", "channel"),
    "scale_channel": ("sample", "channel"),
    "scale_token": ("sample", "row", "column"),
    "logits": ("sample", "class"),
    "embeddings": ("sample", "embedding"),
    "images": ("sample", "row", "column", "rgb"),
    "features": ("sample", "row", "column", "channel"),
}
IMAGES = "images"
SHARDED = frozenset({"features", IMAGES})
SCALES = frozenset({"scale_channel", "scale_token"})
# Arrays that follow from the stored features of their view.
OF_FEATURES = SCALES | {"moments"}
# What the constants of a teacher are called along their axes.
CONSTANT_DIMENSIONS: dict[str, tuple[str, str]] = {
    TEXT_EMBEDDINGS: ("class", "embedding"),
    PCA: ("component", "channel"),
}
_FILL: dict[str, Json] = {"float16": "NaN", "float32": "NaN", "int8": -128, "uint8": 0}


@dataclass(frozen=True)
class ArrayLayout:
    """One array's geometry.

    path: inside the store, `dinov2_vits14/original/features`.  num_samples: N.  sample_shape: all axes but the first.
    dtype: `float16`, `float32`, `int8` or `uint8`.  shard_samples: S.  dimensions: names of all axes.
    """

    path: str
    num_samples: int
    sample_shape: tuple[int, ...]
    dtype: str
    shard_samples: int
    dimensions: tuple[str, ...]
    sharded: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape, [N, …]."""
        return (self.num_samples, *self.sample_shape)

    @cached_property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The little-endian dtype of the bytes on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def sample_bytes(self) -> int:
        """Payload bytes of one sample, without its checksum."""
        return prod(self.sample_shape) * self.numpy_dtype.itemsize

    @cached_property
    def num_shards(self) -> int:
        """Number of shard files of a complete array."""
        return -(-self.num_samples // self.shard_samples)

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index without its checksum."""
        return self.shard_samples * INDEX_ENTRY_BYTES

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of the chunk that carries one checksum."""
        return (1 if self.sharded else self.shard_samples, *self.sample_shape)

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk on disk, its checksum included."""
        return prod(self.chunk_shape) * self.numpy_dtype.itemsize + CRC_BYTES

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Return the first sample of a shard and how many it holds."""
        first = shard * self.shard_samples
        return first, min(self.shard_samples, self.num_samples - first)

    def shard_folder(self, shard: int) -> str:
        """Return the folder of a shard's file, relative to the array's folder."""
        return "/".join(["c", str(shard), *["0"] * (len(self.sample_shape) - 1)])

    def shard_file(self, shard: int) -> str:
        """Return a shard's file, relative to the array's folder: the default chunk key encoding."""
        return f"{self.shard_folder(shard)}/0"

    def shard_file_bytes(self, shard: int) -> int:
        """Return the exact size of a shard's file."""
        if self.sharded:
            _, count = self.shard_range(shard)
            return count * self.chunk_bytes + self.index_bytes + CRC_BYTES
        return self.chunk_bytes

    def metadata(self) -> dict[str, Json]:
        """Return the array's `zarr.json`: what is written at creation and what the reader insists on."""
        index_codecs: list[Json] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        # Single bytes have no order to name.
        bytes_and_crc = index_codecs if self.numpy_dtype.itemsize > 1 else [{"name": "bytes"}, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": [1, *self.sample_shape],
            "codecs": bytes_and_crc,
            "index_codecs": index_codecs,
            "index_location": "end",
        }
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_samples, *self.sample_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _FILL[self.dtype],
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}] if self.sharded else bytes_and_crc,
            "attributes": {},
            "dimension_names": list(self.dimensions),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def sample_array(
    path: str, num_samples: int, sample_shape: tuple[int, ...], dtype: str, shard_samples: int
) -> ArrayLayout:
    """Return the layout of one of a view's arrays; its kind is the path's last part."""
    kind = path.rpartition("/")[2]
    return ArrayLayout(path, num_samples, sample_shape, dtype, shard_samples, DIMENSIONS[kind], kind in SHARDED)


def constant_array(teacher: str, name: str, shape: tuple[int, int]) -> ArrayLayout:
    """Return the layout of one of a teacher's constants, float32 in one chunk."""
    rows, width = shape
    return ArrayLayout(f"{teacher}/{name}", rows, (width,), "float32", rows, CONSTANT_DIMENSIONS[name], sharded=False)


def group_attributes(manifest: dict[str, Json]) -> dict[str, Json]:
    """Return a group's attributes: one of our manifests, and the digest that shows an edited one."""
    return {"teachonce": manifest, "teachonce_sha256": digest(manifest)}


def group_metadata(attributes: Json) -> dict[str, Json]:
    """Return a group's `zarr.json`."""
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
