"""The three manifests of a store and the fingerprints over what they identify.

Three records are never mixed: *identity* is what determines the bytes and is hashed; *layout* is compared on resume;
*provenance* (who, when, which versions) is appended beside the arrays and never compared. A manifest is written once.
"""

from __future__ import annotations

import base64
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from cache.canonical import Json, digest
from cache.layout import DIMENSIONS, RESERVED_KEYS, TEACHER_KEY
from data.geometry import View

StoredDtype = Literal["float16", "float32"]
Sha256 = str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(_Manifest):
    """Which images, in which order. Only the samples themselves (ids, sizes, digests, order) are identity."""

    sets: tuple[str, ...]
    limit: int | None
    samples: int = Field(ge=1, le=100_000_000)
    samples_sha256: Sha256


class RootManifest(_Manifest):
    """The store's own manifest: format, images, frame (H, W)."""

    format_version: Literal[1]
    dataset: Dataset
    frame: tuple[int, int]


class Probe(_Manifest):
    """A teacher's output on one fixed synthetic image, to notice a machine or a library that computes otherwise."""

    float32: str

    @field_validator("float32")
    @classmethod
    def _is_a_vector(cls, value: str) -> str:
        if len(base64.b64decode(value, validate=True)) % 4:
            raise ValueError("expected whole float32 numbers")
        return value

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Self:
        """Return the probe of a vector [n] float32, kept as base64 of its little-endian bytes."""
        return cls(float32=base64.b64encode(values.astype("<f4").tobytes()).decode("ascii"))

    def cosine(self, values: NDArray[np.float32]) -> float:
        """Return the cosine between the stored output and another [n]; 0 where their lengths differ."""
        stored = np.frombuffer(base64.b64decode(self.float32), dtype="<f4").astype(np.float64)
        if stored.shape != values.shape:
            return 0.0
        norms = float(np.linalg.norm(stored) * np.linalg.norm(values))
        return float(stored @ values.astype(np.float64)) / norms if norms > 0 else 0.0


class TeacherManifest(_Manifest):
    """One teacher: everything that determines what it says (`identity`), and its probe."""

    key: str
    identity: dict[str, Any]
    untrained: bool
    probe: Probe
    text_embeddings_shape: tuple[PositiveInt, PositiveInt] | None = None
    text_embeddings_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _key_is_a_folder_name(self) -> Self:
        check_teacher_key(self.key)
        return self


class StoredArray(_Manifest):
    """One array of a view: what a sample of it looks like."""

    sample_shape: tuple[int, ...]
    dtype: StoredDtype
    fingerprint: Sha256


class ViewLayout(_Manifest):
    """How a view was cut: samples a shard, and the batch grid (it starts anew at each shard)."""

    shard_samples: int = Field(ge=1, le=65_536)
    batch_size: int = Field(ge=1)


class ViewManifest(_Manifest):
    """One teacher's targets of one view."""

    view: View
    arrays: dict[str, StoredArray]
    layout: ViewLayout

    @model_validator(mode="after")
    def _arrays_are_known(self) -> Self:
        unknown = sorted(set(self.arrays) - set(DIMENSIONS))
        if unknown or not self.arrays:
            raise ValueError(f"expected some of the arrays {', '.join(DIMENSIONS)}, found {unknown or 'none'}")
        for name, array in self.arrays.items():
            if len(array.sample_shape) != len(DIMENSIONS[name]) - 1 or min(array.sample_shape) < 1:
                raise ValueError(f"{name}: expected axes {DIMENSIONS[name][1:]}, found shape {array.sample_shape}")
        return self


def check_teacher_key(key: str) -> None:
    """Raise ValueError unless the key can name a teacher's folder."""
    if not TEACHER_KEY.fullmatch(key) or key in RESERVED_KEYS:
        raise ValueError(
            "expected a teacher key of a–z, 0–9, '_', '.', '-' (64 at most, starting with a letter or digit),"
            f" found {key!r}"
        )


def array_fingerprint(
    root: RootManifest,
    teacher_identity: Json,
    view: View,
    array: str,
    sample_shape: tuple[int, ...],
    dtype: str,
) -> Sha256:
    """Return the SHA-256 over an array's identity: everything that determines its values."""
    identity = {
        "dataset": {"samples": root.dataset.samples, "samples_sha256": root.dataset.samples_sha256},
        "frame": list(root.frame),
        "teacher": teacher_identity,
        "view": view,
        "array": array,
        "sample_shape": list(sample_shape),
        "dtype": dtype,
    }
    return digest(identity)


def store_fingerprint(array_fingerprints: dict[str, Sha256]) -> Sha256:
    """Return the store's fingerprint: the hash over its arrays' fingerprints, sorted by path."""
    return digest(dict(sorted(array_fingerprints.items())))
