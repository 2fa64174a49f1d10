"""What pycocotools makes of detections and objects, difficult ones ignored."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.records import NUM_CLASSES, Target
from evaluation.detections import Detections
from evaluation.ranking import ranking


class DifficultIgnored(COCOeval):
    """COCOeval that honours `ignore`; its own overwrites it with `iscrowd`, which would change the IoU, too."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for found in objects:
                found["ignore"] = found["difficult"]


def coco_files(detections: Detections, targets: Sequence[Target], rows: NDArray[np.int64]) -> tuple[dict, list[dict]]:
    """Return ground truth and results as COCO has them, results in the order of the rows."""
    objects = [
        (image, int(label), xywh(box), int(hard))
        for image, target in enumerate(targets)
        for box, label, hard in zip(target.boxes_xyxy_orig, target.labels, target.difficult, strict=True)
    ]
    truth = {
        "images": [{"id": image} for image in range(len(targets))],
        "categories": [{"id": label} for label in range(1, NUM_CLASSES)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3],
             "iscrowd": 0, "difficult": hard}
            for number, (image, label, box, hard) in enumerate(objects, start=1)
        ],
    }  # fmt: skip
    results = [
        {
            "image_id": int(detections.image_index[row]),
            "category_id": int(detections.labels[row]),
            "bbox": xywh(detections.boxes_xyxy_orig[row]),
            "score": float(detections.scores[row]),
        }
        for row in rows
    ]
    return truth, results


def xywh(box: NDArray[np.float32]) -> list[float]:
    x1, y1, x2, y2 = (float(side) for side in box)
    return [x1, y1, x2 - x1, y2 - y1]


def coco_ap(detections: Detections, targets: Sequence[Target]) -> NDArray[np.float64]:
    """Return AP [20, 10, 4] by class, IoU and area (all, small, medium, large); NaN without objects."""
    dataset, results = coco_files(detections, targets, ranking(detections))
    truth = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = dataset
        truth.createIndex()
        run = DifficultIgnored(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., -1].mean(axis=1)  # recall points
    return np.where(precision < 0, np.nan, precision).transpose(1, 0, 2)
