"""What the decoded images of a run are: the frame of each, what identifies them, and how one is made.

The store's format knows teachers, so images are what a pseudo-teacher, `frames`, says of an image. It has no weights:
its identity is decoder and resizer, and its probe tells a machine or a library that decodes otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache.catalog import Catalog
from cache.compatibility import MIN_PROBE_COSINE, refuse_other_dataset, refuse_other_teacher, refuse_other_view
from cache.layout import IMAGES
from cache.plan import StorePlan, TeacherPlan
from cache.samples import SampleEntry
from data.errors import ImageError, StoreStaleError
from data.geometry import FRAME_SIZE
from data.images import DECODER, decode_file, decode_image, image_digest, read_image_bytes, squash
from data.records import ImageRecord

FRAMES = "frames"
_SHARD_SAMPLES = 64
_BATCH_SIZE = 1  # each image is decoded by itself
# 20×28 px, chroma subsampled as in VOC's images. As bytes, so that only decoding and resizing are probed.
_PROBE_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAUABwD"
    "ASIAAhEBAxEB/8QAGAAAAwEBAAAAAAAAAAAAAAAAAAUGBAH/xAAtEAABAwMCBAILAAAAAAAAAAABAgMEABEhBQYSE0GyNXMxMjNRUmFxgZLR0v/E"
    "ABcBAAMBAAAAAAAAAAAAAAAAAAIEBgX/xAAnEQABAwEGBgMAAAAAAAAAAAABAAIDMQQFEyFBcREjMzRhYpHB8P/aAAwDAQACEQMRAD8ASxtvSoTy"
    "JbrjJRHIcUEKJNhk2x8qbOakzrTKtPjJcQ896pcACcZOQSelL40jWHXENzEvCMpQS6VM8I4OtzbAtfNNXIunxmC9pJbM1NuWG3C4o5sbJub4vQy2"
    "IlwMmbtCKDdJwvJcMXN2hFBuuQIbm3nVS5hStC08oBnJuc9bfCaaJ3NBt7KR+Kf3WCAZMx0t68FJjAcSS8nlDj6ZxmxOKajTtv2wtj7SD/VIzWJh"
    "dzQSfFFusdGTxmBLvWizzvDZfkr7ands51tj6q7TRRVXCBgyftFM3T20m30qbdHhrXnDtNTafR7qKKGyAYXyq65+gv/Z"
)


def image_plan(samples: Sequence[SampleEntry], sets: Sequence[str], limit: int | None = None) -> StorePlan:
    """Return what a store of these images is: one pseudo-teacher, which says of an image what it looks like."""
    identity = {"decoder": DECODER, "input_size": list(FRAME_SIZE), "resample": "bilinear", "antialias": True}
    frames = TeacherPlan(FRAMES, identity, False, probe_decoder(), {IMAGES: (*FRAME_SIZE, 3)})
    return StorePlan(
        sets=tuple(sets),
        limit=limit,
        samples=samples,
        teachers=[frames],
        views=("original",),
        feature_dtype="float32",  # of none
        shard_samples=_SHARD_SAMPLES,
        batch_size=_BATCH_SIZE,
    )


def probe_decoder() -> NDArray[np.float32]:
    """Return a SHA-256 over the pixels of a fixed JPEG, enlarged and reduced, as 256 numbers −1 or 1.

    A pixel that is decoded otherwise turns about half of them: unlike the cosine of two images, that of two such
    vectors is 1 or near 0.
    """
    frame = squash(decode_file(Path("probe"), _PROBE_JPEG))
    reduced = squash(Image.fromarray(frame), (160, 200))
    digest = hashlib.sha256(frame.tobytes() + reduced.tobytes()).digest()
    return np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32) * 2 - 1


def refuse_other_frames(catalog: Catalog, plan: StorePlan) -> None:
    """Raise StoreStaleError unless an image store holds the plan's images, as they are now and are decoded here."""
    asked = in_stored_order(catalog, plan)
    refuse_other_dataset(catalog, asked)
    (frames,) = asked.teachers
    stored = catalog.teacher(FRAMES)
    if stored.manifest.identity == frames.identity and stored.manifest.probe.cosine(frames.probe) < MIN_PROBE_COSINE:
        raise StoreStaleError(
            f"{catalog.path}: {FRAMES}.probe: Pillow {importlib.metadata.version('pillow')} on {platform.machine()}"
            " decodes or resizes a fixed image to other pixels than what filled this store"
        )
    refuse_other_teacher(catalog.path, stored, frames)
    refuse_other_view(catalog.path, stored, asked.view_manifest(catalog.root, frames, "original", _BATCH_SIZE))


def in_stored_order(catalog: Catalog, plan: StorePlan) -> StorePlan:
    """Return the plan of the whole store: its samples, in its order, those of the plan as the plan has them.

    So a store of more images, or of the same in another order, is no other store. A plan of other images is returned
    as it is.
    """
    asked = {sample.id: sample for sample in plan.samples}
    stored = {sample.id: sample for sample in catalog.samples}
    if not asked.keys() <= stored.keys():
        return plan
    layout = catalog.teacher(FRAMES).view("original").manifest.layout
    samples = [asked.get(image_id, sample) for image_id, sample in stored.items()]
    return replace(plan, samples=samples, shard_samples=layout.shard_samples)


@dataclass(frozen=True)
class FrameDecoder:
    """What a worker process runs. records, samples: by row of the store."""

    records: Sequence[ImageRecord]
    samples: Sequence[SampleEntry]

    def decode(self, row: int) -> NDArray[np.uint8]:
        """Return a row's image [480, 480, 3].

        Raises ImageError for an image that cannot be decoded, or is not the one that was hashed.
        """
        record = self.records[row]
        data = read_image_bytes(record.image_path)
        if image_digest(data) != self.samples[row].sha256:
            raise ImageError(
                f"{record.image_path}: the image changed while the images were being cached",
                hint="put it back and run the same command again",
            )
        return squash(decode_image(record, data))
