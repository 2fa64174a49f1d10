"""Runs an exported student on images and compares it with PyTorch's, detection by detection.

Two runtimes sum in another order, so numbers differ in their last digits. That may reverse two detections of nearly one
score, and rarely lets non-maximum suppression keep the other of two boxes; both are counted and told.

Axes: n detections of one image.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.errors import ExportError
from data.images import decode_image, squash
from data.records import VOC_CLASSES
from data.scene import render_scene
from data.voc import read_voc
from pipeline.config import TrainConfig
from pipeline.progress import progress
from students.detector import Student

BOX_TOLERANCE_PX = 1e-2
SCORE_TOLERANCE = 1e-4
# A near-tie of non-maximum suppression that falls the other way leaves a few detections without a counterpart: 12 of
# 160,000, of both sides, with two barely trained students on 800 VOC images. A wrong graph leaves nearly all.
MAX_UNPAIRED_SHARE = 0.01


class FrameDetections(NamedTuple):
    """Detections of one image: boxes_xyxy [n, 4] in frame px, labels [n] 1..20, scores [n] falling."""

    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]


class CheckImages(NamedTuple):
    """Frames [1, 3, 480, 480] float32 in [0, 1], the id of each, and in words what they are."""

    ids: list[str]
    frames: list[Tensor]
    what: str


@dataclass(frozen=True)
class Agreement:
    """How far an exported student's detections are from PyTorch's.

    detections: PyTorch's, over all images.  box_px, score: largest differences of pairs.  reordered: pairs in another
    order.  unpaired: detections of either side without a counterpart within the tolerances.  first_unpaired: one, told.
    """

    images: int
    detections: int
    box_px: float
    score: float
    reordered: int
    unpaired: int
    first_unpaired: str | None

    @property
    def holds(self) -> bool:
        """Whether so few detections lack a counterpart that near-ties explain them."""
        return self.unpaired <= MAX_UNPAIRED_SHARE * 2 * self.detections


def check_images(
    config: TrainConfig, count: int, voc_root: Path | None = None, voc_sets: Sequence[str] = ()
) -> CheckImages:
    """Return `count` images spread over the sets (by default the run's validation images), at most all of them.

    Without a choice, and where the run's devkit is not there, they are drawn.

    Raises DatasetError or ImageError for images that cannot be read.
    """
    if voc_root is None and not voc_sets and not config.voc_root.is_dir():
        scenes = [render_scene(0, index, VOC_CLASSES).image for index in range(count)]
        frames = [_frame(Image.fromarray(scene)) for scene in scenes]
        return CheckImages([f"drawn {index}" for index in range(count)], frames, f"drawn (no {config.voc_root} here)")
    sets = tuple(voc_sets) or config.val_sets
    records = read_voc(voc_root or config.voc_root, sets)
    places = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int).tolist()
    chosen = [records[place] for place in places]
    return CheckImages([r.id for r in chosen], [_frame(decode_image(r)) for r in chosen], f"of {'+'.join(sets)}")


def student_detections(student: Student, images: CheckImages) -> list[FrameDetections]:
    """Return what a student in evaluation mode finds in each image alone, on the CPU."""
    found = []
    with torch.inference_mode(), progress("detecting with PyTorch", len(images.frames)) as tick:
        for frame in images.frames:
            results = student(frame)
            assert isinstance(results, list)
            found.append(FrameDetections(*(results[0][name].numpy() for name in ("boxes", "labels", "scores"))))
            tick()
    return found


def can_run_onnx() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def onnx_detections(path: Path, images: CheckImages) -> list[FrameDetections]:
    """Return what an exported ONNX model finds in each image, by onnxruntime on the CPU.

    Raises ExportError where onnxruntime refuses or fails to run it.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found = []
    with progress("detecting with onnxruntime", len(images.frames)) as tick:
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for frame in images.frames:
                outputs = session.run(["boxes", "labels", "scores"], {"image": frame.numpy()})
                found.append(FrameDetections(*outputs))
                tick()
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} cannot run the exported model ({error})",
                hint="try another --opset, or update onnxruntime",
            ) from error
    return found


def compare(
    expected: Sequence[FrameDetections], found: Sequence[FrameDetections], image_ids: Sequence[str]
) -> Agreement:
    """Return how far the detections found are from those expected, image by image.

    Two are a pair where the labels are equal and boxes and scores within the tolerances.
    """
    box_px = score = 0.0
    reordered = unpaired = 0
    first_unpaired = None
    for image_id, ours, theirs in zip(image_ids, expected, found, strict=True):
        pairs = _pairs(ours, theirs)
        for i, j in pairs:
            box_px = max(box_px, float(np.abs(ours.boxes_xyxy[i] - theirs.boxes_xyxy[j]).max()))
            score = max(score, float(abs(ours.scores[i] - theirs.scores[j])))
        places = [j for _, j in pairs]
        reordered += sum(place != in_order for place, in_order in zip(places, sorted(places), strict=True))
        unpaired += len(ours.scores) + len(theirs.scores) - 2 * len(pairs)
        if first_unpaired is None:
            first_unpaired = _first_unpaired(image_id, ours, theirs, pairs)
    detections = sum(len(ours.scores) for ours in expected)
    return Agreement(len(expected), detections, box_px, score, reordered, unpaired, first_unpaired)


def _pairs(ours: FrameDetections, theirs: FrameDetections) -> list[tuple[int, int]]:
    """Return the rows of both that are the same detection, each row at most once, in our order."""
    box_gaps = np.abs(ours.boxes_xyxy[:, None] - theirs.boxes_xyxy[None]).max(axis=2, initial=0)
    score_gaps = np.abs(ours.scores[:, None] - theirs.scores[None])
    same = ours.labels[:, None] == theirs.labels[None]
    same &= (box_gaps <= BOX_TOLERANCE_PX) & (score_gaps <= SCORE_TOLERANCE)
    pairs, free = [], np.ones(len(theirs.scores), dtype=bool)
    for i, row in enumerate(same):
        candidates = np.flatnonzero(row & free)
        if len(candidates):
            j = int(candidates[np.abs(candidates - i).argmin()])
            free[j] = False
            pairs.append((i, j))
    return pairs


def _first_unpaired(
    image_id: str, ours: FrameDetections, theirs: FrameDetections, pairs: Sequence[tuple[int, int]]
) -> str | None:
    for side, (who, detections) in enumerate((("PyTorch", ours), ("the exported model", theirs))):
        rest = sorted(set(range(len(detections.scores))) - {pair[side] for pair in pairs})
        if rest:
            label = int(detections.labels[rest[0]])
            name = VOC_CLASSES[label - 1] if 1 <= label <= len(VOC_CLASSES) else "no class"
            box = ", ".join(f"{edge:.2f}" for edge in detections.boxes_xyxy[rest[0]].tolist())
            return f"{image_id}: only {who} finds label {label} ({name}), score {detections.scores[rest[0]]:.5f}, {box}"
    return None


def _frame(image: Image.Image) -> Tensor:
    return torch.from_numpy(squash(image)).permute(2, 0, 1)[None].float() / 255
