"""The three manifests of a store and the fingerprints over what they identify.

Three records are never mixed: *identity* is what determines the bytes and is hashed; *layout* is compared on resume;
*provenance* (who, when, which versions) is appended beside the arrays and never compared. A manifest is written once.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from cache.canonical import Json, digest
from cache.layout import DIMENSIONS, IMAGES, OF_FEATURES, PCA, RESERVED_KEYS, SCALES, TEACHER_KEY, TEXT_EMBEDDINGS
from data.geometry import View

StoredDtype = Literal["float16", "float32", "int8"]  # of what teachers say
ArrayDtype = StoredDtype | Literal["uint8"]  # the latter of images alone
Sha256 = str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def written(self) -> dict[str, Json]:
        """Return the manifest as it stands in the store: fields that were never set are not there."""
        return self.model_dump(mode="json", exclude_unset=True)


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

    @property
    def values(self) -> NDArray[np.float32]:
        """The stored output, [n] float32."""
        return np.frombuffer(base64.b64decode(self.float32), dtype="<f4")

    def cosine(self, values: NDArray[np.float32]) -> float:
        """Return the cosine between the stored output and another [n]; 0 where their lengths differ."""
        stored = self.values.astype(np.float64)
        if stored.shape != values.shape:
            return 0.0
        norms = float(np.linalg.norm(stored) * np.linalg.norm(values))
        return float(stored @ values.astype(np.float64)) / norms if norms > 0 else 0.0


class PcaManifest(_Manifest):
    """The basis that a derived teacher's features were projected on: kept as the constant `pca`.

    shape: (1 + R, C), the mean and R components.  fit_samples_sha256: digest of the ids it was fitted on, in row order.
    explained_variance: share of the variance of those samples' tokens that the R components hold.
    """

    shape: tuple[PositiveInt, PositiveInt]
    sha256: Sha256
    fit_samples: PositiveInt
    fit_samples_sha256: Sha256
    explained_variance: float = Field(ge=0, le=1)


class TeacherManifest(_Manifest):
    """One teacher: everything that determines what it says (`identity`), and its probe.

    pca: only in a derived store whose features were projected.
    """

    key: str
    identity: dict[str, Any]
    untrained: bool
    probe: Probe
    text_embeddings_shape: tuple[PositiveInt, PositiveInt] | None = None
    text_embeddings_sha256: Sha256 | None = None
    pca: PcaManifest | None = None

    @model_validator(mode="after")
    def _key_is_a_folder_name(self) -> Self:
        check_teacher_key(self.key)
        return self

    @property
    def constants(self) -> dict[str, tuple[tuple[int, int], Sha256]]:
        """Shape and SHA-256 of the bytes of each of the teacher's constants, by array name."""
        found = {}
        if self.text_embeddings_shape is not None:
            found[TEXT_EMBEDDINGS] = (self.text_embeddings_shape, self.text_embeddings_sha256 or "")
        if self.pca is not None:
            found[PCA] = (self.pca.shape, self.pca.sha256)
        return found


class StoredArray(_Manifest):
    """One array of a view: what a sample of it looks like.

    source: the fingerprint of the array it was computed from, where `convert-cache` or `relabel-logits` did.
    """

    sample_shape: tuple[int, ...]
    dtype: ArrayDtype
    fingerprint: Sha256
    source: Sha256 | None = None


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
            if array.dtype == "int8" and (name != "features" or not set(self.arrays) >= SCALES):
                raise ValueError(f"{name}: only features may be int8, and only with {' and '.join(sorted(SCALES))}")
            if (array.dtype == "uint8") != (name == IMAGES):
                raise ValueError(f"{name}: images are uint8, and nothing else is; found {array.dtype}")
        if IMAGES in self.arrays and (len(self.arrays) > 1 or self.arrays[IMAGES].sample_shape[-1] != 3):
            raise ValueError(f"{IMAGES}: expected them alone in their view, with three channels")
        for name in sorted(OF_FEATURES & set(self.arrays)):
            found, expected = self.arrays[name].sample_shape, _shape_beside(name, self.arrays.get("features"))
            if found != expected:
                raise ValueError(f"{name}: expected shape {expected} as of the features, found {found}")
        return self


@dataclass(frozen=True)
class TeacherParts:
    """All that is written when a teacher is put into a store. constants: float32, by array name."""

    manifest: TeacherManifest
    constants: dict[str, NDArray[np.float32]]
    views: dict[View, ViewManifest]


def _shape_beside(name: str, features: StoredArray | None) -> tuple[int, ...] | None:
    """Return the shape of one sample of an array that follows from features; None where there are none."""
    if features is None:
        return None
    rows, columns, channels = features.sample_shape
    return {"moments": (2, channels), "scale_channel": (channels,), "scale_token": (rows, columns)}[name]


def check_teacher_key(key: str) -> None:
    """Raise ValueError unless the key can name a teacher's folder."""
    if not TEACHER_KEY.fullmatch(key) or key in RESERVED_KEYS:
        raise ValueError(
            "expected a teacher key of a–z, 0–9, '_', '.', '-' (64 at most, starting with a letter or digit),"
            f" found {key!r}"
        )


def array_fingerprint(
    root: RootManifest,
    teacher: TeacherManifest,
    view: View,
    name: str,
    array: StoredArray,
    features_dtype: str | None,
) -> Sha256:
    """Return the SHA-256 over an array's identity: everything that determines its values.

    features_dtype: stored dtype of the features of the same view; moments are those of what is stored.
    """
    identity: dict[str, Json] = {
        "dataset": {"samples": root.dataset.samples, "samples_sha256": root.dataset.samples_sha256},
        "frame": list(root.frame),
        "teacher": teacher.identity,
        "view": view,
        "array": name,
        "sample_shape": list(array.sample_shape),
        "dtype": array.dtype,
    }
    if name in OF_FEATURES and features_dtype != "float16":
        identity["features_dtype"] = features_dtype
    if array.source is not None:
        identity["source"] = array.source
        if teacher.pca is not None and name in {*OF_FEATURES, "features"}:
            identity["pca"] = teacher.pca.model_dump(mode="json")
    return digest(identity)


def store_fingerprint(array_fingerprints: dict[str, Sha256]) -> Sha256:
    """Return the store's fingerprint: the hash over its arrays' fingerprints, sorted by path."""
    return digest(dict(sorted(array_fingerprints.items())))
