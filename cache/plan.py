"""What a writer is asked to keep: the images, the teachers with what they put out, the views, the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache.layout import DIMENSIONS, FORMAT_VERSION, IMAGES, PCA, TEXT_EMBEDDINGS, ArrayLayout, sample_array
from cache.manifest import (
    ArrayDtype,
    Dataset,
    PcaManifest,
    Probe,
    RootManifest,
    StoredArray,
    StoredDtype,
    TeacherManifest,
    ViewLayout,
    ViewManifest,
    array_fingerprint,
)
from cache.samples import SampleEntry, encode_samples, samples_digest
from data.geometry import FRAME_SIZE, View

StoreFormat = Literal["zarr", "hdf5"]


@dataclass(frozen=True)
class Derivation:
    """How a teacher's arrays follow from others: those of another store, or the embeddings of this one.

    sources: fingerprint of the source array by view and array name; a missing one means that the bytes are the same.
    basis: [1 + R, C] float32, the mean and the components that features were projected on, with its manifest.
    """

    sources: dict[View, dict[str, str]]
    pca: PcaManifest | None = None
    basis: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher as the store sees it.

    outputs: per-sample shape by array name (`features`: (Gh, Gw, C); `logits`: (K,); `embeddings`: (D,); `images`:
    (H, W, 3)).  probe: [n] float32.  text_embeddings: [K, D] float32 of a logit teacher.  feature_dtype, batch_size:
    where they are not those of the whole plan.
    """

    key: str
    identity: dict[str, Any]
    untrained: bool
    probe: NDArray[np.float32]
    outputs: dict[str, tuple[int, ...]]
    text_embeddings: NDArray[np.float32] | None = None
    feature_dtype: StoredDtype | None = None
    batch_size: int | None = None
    derivation: Derivation | None = None

    def manifest(self) -> TeacherManifest:
        """Return the manifest to write at the teacher's creation."""
        text = self.text_embeddings
        return TeacherManifest(
            key=self.key,
            identity=self.identity,
            untrained=self.untrained,
            probe=Probe.of(self.probe),
            text_embeddings_shape=None if text is None else (text.shape[0], text.shape[1]),
            text_embeddings_sha256=None if text is None else constant_digest(text),
            **({} if self.derivation is None or self.derivation.pca is None else {"pca": self.derivation.pca}),
        )

    def constants(self) -> dict[str, NDArray[np.float32]]:
        """Return the teacher's constants by array name."""
        basis = None if self.derivation is None else self.derivation.basis
        found = {TEXT_EMBEDDINGS: self.text_embeddings, PCA: basis}
        return {name: values for name, values in found.items() if values is not None}

    def array_shapes(self, features_dtype: StoredDtype) -> dict[str, tuple[int, ...]]:
        """Return the per-sample shape of every stored array: the outputs, and what goes with features."""
        shapes = dict(self.outputs)
        if "features" in shapes:
            rows, columns, channels = shapes["features"]
            shapes["moments"] = (2, channels)
            if features_dtype == "int8":
                shapes["scale_channel"] = (channels,)
                shapes["scale_token"] = (rows, columns)
        return shapes


@dataclass(frozen=True)
class StorePlan:
    """The whole store as asked for. batch_size None: reuse what a stored view recorded, else the default one.

    format: the container; None: that of the store that is there, for a new one as the path's suffix says.
    """

    sets: tuple[str, ...]
    limit: int | None
    samples: Sequence[SampleEntry]
    teachers: Sequence[TeacherPlan]
    views: Sequence[View]
    feature_dtype: StoredDtype
    shard_samples: int
    batch_size: int | None
    frame: tuple[int, int] = FRAME_SIZE
    format: StoreFormat | None = None
    default_batch_size: int = 16

    def root_manifest(self) -> RootManifest:
        """Return the root manifest to write at creation."""
        dataset = Dataset(
            sets=self.sets,
            limit=self.limit,
            samples=len(self.samples),
            samples_sha256=samples_digest(encode_samples(self.samples)),
        )
        return RootManifest(format_version=FORMAT_VERSION, dataset=dataset, frame=self.frame)

    def view_manifest(self, root: RootManifest, teacher: TeacherPlan, view: View, batch_size: int) -> ViewManifest:
        """Return the manifest of one teacher's view."""
        features_dtype = self.features_dtype(teacher)
        sources = {} if teacher.derivation is None else teacher.derivation.sources.get(view, {})
        arrays = {}
        for name, shape in teacher.array_shapes(features_dtype).items():
            dtype = array_dtype(name, features_dtype)
            source = {"source": sources[name]} if name in sources else {}
            array = StoredArray(sample_shape=shape, dtype=dtype, fingerprint="", **source)
            fingerprint = array_fingerprint(root, teacher.manifest(), view, name, array, features_dtype)
            arrays[name] = array.model_copy(update={"fingerprint": fingerprint})
        layout = ViewLayout(shard_samples=self.shard_samples, batch_size=batch_size)
        return ViewManifest(view=view, arrays=arrays, layout=layout)

    def features_dtype(self, teacher: TeacherPlan) -> StoredDtype:
        """Return the stored dtype of a teacher's features."""
        return teacher.feature_dtype or self.feature_dtype

    def planned_bytes(self) -> int:
        """Return the bytes of all sample arrays of the complete store, without checksums and indices."""
        sample = 0
        for teacher in self.teachers:
            features_dtype = self.features_dtype(teacher)
            for name, shape in teacher.array_shapes(features_dtype).items():
                sample += int(np.prod(shape)) * np.dtype(array_dtype(name, features_dtype)).itemsize
        return sample * len(self.views) * len(self.samples)


def array_dtype(name: str, features_dtype: StoredDtype) -> ArrayDtype:
    """Return the stored dtype of an array: given for features, uint8 for images, float32 for all that is small."""
    return {"features": features_dtype, IMAGES: "uint8"}.get(name, "float32")


def constant_digest(values: NDArray[np.float32]) -> str:
    """Return the SHA-256 of a constant's little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


def format_of(path: Path) -> StoreFormat:
    """Return the container that a new store's path asks for by its suffix."""
    return "hdf5" if path.suffix in (".h5", ".hdf5") else "zarr"


def view_layouts(root: RootManifest, teacher: str, manifest: ViewManifest) -> dict[str, ArrayLayout]:
    """Return the layouts of a view's arrays by name, in the order in which they are committed."""
    return {
        name: sample_array(
            f"{teacher}/{manifest.view}/{name}",
            root.dataset.samples,
            manifest.arrays[name].sample_shape,
            manifest.arrays[name].dtype,
            manifest.layout.shard_samples,
        )
        for name in DIMENSIONS
        if name in manifest.arrays
    }
