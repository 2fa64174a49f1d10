"""Evaluators of detections, each in a process of its own: `python -m benchmarks.evaluators NAME FOLDER`.

Every one reads the same detections and the same ground truth, in the format it is made for, and scores them with its
defaults: ten IoU thresholds, and all areas. Times are processor seconds of all threads, as on one core that nothing
else uses.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.voc import read_voc
from evaluation.average_precision import evaluate
from evaluation.detection_files import read_detections
from evaluation.matching import Metric

# What a contender returns: seconds of reading, seconds of scoring, and its mAP.
Measured = tuple[float, float, float | None]


def ours(folder: Path, found: str, metric: Metric) -> Measured:
    """Score as `eval` does: every definition, per class and by size, from the devkit's annotations."""
    start = time.process_time()
    records = read_voc(folder / "VOCdevkit", [(folder / "set.txt").read_text()])
    detections, _ = read_detections(folder / found, records)
    middle = time.process_time()
    result = evaluate(detections, records, metric)
    return middle - start, time.process_time() - middle, result.mAP


def pycocotools(folder: Path) -> Measured:
    """COCOeval of the cocoapi."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _coco_eval(folder, COCO, COCOeval)


def faster_coco_eval(folder: Path) -> Measured:
    """Its C++ evaluation."""
    from faster_coco_eval import COCO, COCOeval_faster

    return _coco_eval(folder, COCO, COCOeval_faster)


def _coco_eval(folder: Path, coco: Any, coco_eval: Any) -> Measured:
    start = time.process_time()
    truth = coco(str(folder / "truth.json"))
    found = truth.loadRes(str(folder / "found.json"))
    middle = time.process_time()
    run = coco_eval(truth, found, "bbox")
    run.evaluate()
    run.accumulate()
    end = time.process_time()
    precision = run.eval["precision"][:, :, :, 0, -1]
    return middle - start, end - middle, float(np.mean(precision[precision > -1]))


def torchmetrics(folder: Path) -> Measured:
    """MeanAveragePrecision, filled image by image."""
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    torch.set_num_threads(1)
    start = time.process_time()
    images = _by_image(folder)
    metric = MeanAveragePrecision(box_format="xywh")
    middle = time.process_time()
    for found, truth in images:
        metric.update(
            [{key: torch.tensor(values) for key, values in found.items()}],
            [{key: torch.tensor(values) for key, values in truth.items()}],
        )
    computed = metric.compute()
    return middle - start, time.process_time() - middle, float(computed["map"])


def _by_image(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    truth = json.loads((folder / "truth.json").read_text())
    images: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
        image["id"]: ({"boxes": [], "scores": [], "labels": []}, {"boxes": [], "labels": []})
        for image in truth["images"]
    }
    for side, entries in ((1, truth["annotations"]), (0, json.loads((folder / "found.json").read_text()))):
        for entry in entries:
            of_image = images[entry["image_id"]][side]
            of_image["boxes"].append(entry["bbox"])
            of_image["labels"].append(entry["category_id"])
            if side == 0:
                of_image["scores"].append(entry["score"])
    for _, objects in images.values():  # an image without objects still needs boxes of four numbers
        objects["boxes"] = np.array(objects["boxes"], dtype=np.float32).reshape(-1, 4)
        objects["labels"] = np.array(objects["labels"], dtype=np.int64)
    return list(images.values())


# Each with what it imports.
CONTENDERS: dict[str, tuple[Callable[[Path], Measured], str]] = {
    "ours, COCO's results": (lambda folder: ours(folder, "found.json", "coco"), "evaluation"),
    "ours, devkit's files": (lambda folder: ours(folder, "found", "voc"), "evaluation"),
    "faster-coco-eval": (faster_coco_eval, "faster_coco_eval"),
    "pycocotools": (pycocotools, "pycocotools.cocoeval"),
    "torchmetrics": (torchmetrics, "torchmetrics.detection"),
}


def main(name: str, folder: Path) -> dict[str, float | None]:
    """Measure one contender, with what it imports left out of time and memory."""
    run, module = CONTENDERS[name]
    __import__(module)
    before = _peak_mib()
    with contextlib.redirect_stdout(io.StringIO()):
        reading, scoring, mean = run(folder)
    return {"read": reading, "score": scoring, "mAP": mean, "peak_mib": _peak_mib() - before}


def _peak_mib() -> float:
    # Not getrusage's: that of a child begins at its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
