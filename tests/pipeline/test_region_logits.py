"""Region logits from a store of dense CLIP features against those of the live teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cache.manifest import StoredDtype
from cache.reader import TeacherStore, read_features
from data.geometry import VIEWS, View, boxes_to_frame
from data.images import squash
from data.records import ImageRecord
from features.dense_clip import DenseClipTeacher
from features.regions import region_logits
from features.registry import build_teacher
from pipeline.extract import extract
from tests.pipeline.small_runs import extraction

SPEC = "open_clip:regions-16@dense"
SCALE = 100.0
CONFIG = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "layers": 2, "width": 128},
    "text_cfg": {"width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with the embeddings of a ViT-B/16, as open_clip initialised it."""
    folder = tmp_path_factory.mktemp("regions")
    (folder / "regions-16.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "regions-16.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(31)
        torch.save(open_clip.create_model("regions-16").state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module")
def teacher(weights: Path) -> DenseClipTeacher:
    teacher = build_teacher(SPEC, weights=weights)
    assert isinstance(teacher, DenseClipTeacher)
    return teacher


def boxes_of(records: list[ImageRecord], view: View) -> list[Tensor]:
    return [
        torch.from_numpy(boxes_to_frame(record.target.boxes_xyxy_orig, record.image_size, view)) for record in records
    ]


def live_features(teacher: DenseClipTeacher, records: list[ImageRecord], view: View) -> Tensor:
    images = [Image.open(record.image_path).convert("RGB") for record in records]
    shown = [ImageOps.mirror(image) if view == "hflip" else image for image in images]
    pixels = np.stack([squash(image, teacher.input.size, teacher.input.resample) for image in shown])
    features = teacher(torch.from_numpy(pixels)).features
    assert features is not None
    return features


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 1e-3), ("int8", 5e-2)])
def test_logits_of_stored_features_are_those_of_the_live_teacher(
    weights: Path, teacher: DenseClipTeacher, records: list[ImageRecord], devkit: Path, tmp_path: Path,
    dtype: StoredDtype, tolerance: float,
) -> None:  # fmt: skip
    """Tolerances are absolute, on logits: at a scale of 100 they are 100 times as strict on the cosines."""
    config = extraction(
        devkit, tmp_path / "store.zarr", teachers=(f"dense={SPEC}",), weights={"dense": weights}, dtype=dtype
    )
    store = TeacherStore(extract(config).store)
    text = torch.from_numpy(store.text_embeddings("dense"))
    np.testing.assert_array_equal(text, teacher.text_embeddings)
    for view in VIEWS:
        boxes = boxes_of(records, view)
        live = region_logits(live_features(teacher, records, view), boxes, text, logit_scale=SCALE)
        stored = torch.from_numpy(np.stack([read_features(store, "dense", view, row) for row in range(len(records))]))
        found = region_logits(stored, boxes, text, logit_scale=SCALE)
        assert found.shape == (sum(map(len, boxes)), 20)
        torch.testing.assert_close(found, live, rtol=0, atol=tolerance)
        # The boxes mirrored, on the map as it was, must not pass for right.
        assert (region_logits(stored.flip(2), boxes, text, logit_scale=SCALE) - live).abs().max() > 10 * tolerance
