"""What a writer is asked to keep: the images, the teachers with what they put out, the views, the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.layout import DIMENSIONS, FORMAT_VERSION, ArrayLayout, sample_array
from cache.manifest import (
    Dataset,
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


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher as the store sees it.

    outputs: per-sample shape by array name (`features`: (Gh, Gw, C); `logits`: (K,); `embeddings`: (D,)).
    probe: [n] float32.  text_embeddings: [K, D] float32 of a logit teacher.
    """

    key: str
    identity: dict[str, Any]
    untrained: bool
    probe: NDArray[np.float32]
    outputs: dict[str, tuple[int, ...]]
    text_embeddings: NDArray[np.float32] | None = None

    def manifest(self) -> TeacherManifest:
        """Return the manifest to write at the teacher's creation."""
        text = self.text_embeddings
        return TeacherManifest(
            key=self.key,
            identity=self.identity,
            untrained=self.untrained,
            probe=Probe.of(self.probe),
            text_embeddings_shape=None if text is None else (text.shape[0], text.shape[1]),
            text_embeddings_sha256=None if text is None else samples_digest(text.astype("<f4").tobytes()),
        )

    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the per-sample shape of every stored array: the outputs, and moments where there are features."""
        shapes = dict(self.outputs)
        if "features" in shapes:
            shapes["moments"] = (2, shapes["features"][-1])
        return shapes


@dataclass(frozen=True)
class StorePlan:
    """The whole store as asked for. batch_size None: reuse what a stored view recorded, else the default."""

    sets: tuple[str, ...]
    limit: int | None
    samples: Sequence[SampleEntry]
    teachers: Sequence[TeacherPlan]
    views: Sequence[View]
    feature_dtype: StoredDtype
    shard_samples: int
    batch_size: int | None
    frame: tuple[int, int] = FRAME_SIZE

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
        arrays = {}
        for name, shape in teacher.array_shapes().items():
            dtype = self.dtype_of(name)
            fingerprint = array_fingerprint(root, teacher.identity, view, name, shape, dtype)
            arrays[name] = StoredArray(sample_shape=shape, dtype=dtype, fingerprint=fingerprint)
        layout = ViewLayout(shard_samples=self.shard_samples, batch_size=batch_size)
        return ViewManifest(view=view, arrays=arrays, layout=layout)

    def dtype_of(self, array: str) -> StoredDtype:
        """Return the stored dtype of an array: the chosen one for features, float32 for all that is small."""
        return self.feature_dtype if array == "features" else "float32"


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
