"""Folders of finished runs as `train` leaves them, in no time: detections are jittered ground truth, untrained.

`tests/pipeline/test_report.py` holds them against the folder of a run that was really trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.records import ImageRecord
from data.voc import read_voc
from evaluation.average_precision import evaluate
from evaluation.detections import Detections, ImageDetections
from evaluation.devkit_files import write_devkit
from pipeline.config import Distillation, Recipe, TrainConfig
from students.config import StudentConfig

CACHED = Distillation(source="store", stores=(Path("teachers.zarr"),))
_FINGERPRINT = "0123456789abcdef" * 4


def make_run(voc_root: Path, folder: Path, name: str, *, skill: float = 0.6, **changes: Any) -> Path:
    """Write the folder of a run and return it. skill: how good its detections are, 0..1; `changes` as `TrainConfig`."""
    settings: dict[str, Any] = {
        "run_name": name,
        "voc_root": voc_root,
        "voc_sets": ("2007:train",),
        "val_sets": ("2007:val",),
        "student": StudentConfig(backbone="mobilenet_v3_small", backbone_weights="none"),
        "recipe": Recipe(epochs=4, batch_size=4),
        "device": "cpu",
        "runs_dir": folder / "runs",
        "checkpoints_dir": folder / "checkpoints",
    }
    config = TrainConfig(**{**settings, **changes}).resolved()
    run = config.run_dir
    run.mkdir(parents=True)
    scored = {}
    for what, sets in (("val", config.val_sets), ("test", config.test_sets)):
        if sets:
            records = read_voc(voc_root, sets)
            found = jittered(records, skill, config.seed)
            write_devkit(found, run / "detections" / what, prefix=f"comp4_det_{what}")
            scored[what] = evaluate(found, records).to_json()
    history = [_epoch(number, config, scored["val"]) for number in range(1, config.recipe.epochs + 1)]
    _write(run / "config.json", config.model_dump(mode="json"))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
    _write(run / "result.json", _result(config, history, scored))
    return run


def jittered(records: Sequence[ImageRecord], skill: float, seed: int) -> Detections:
    """Most objects found, at boxes the better the higher the skill; wrong classes, duplicates and noise besides."""
    rng = np.random.default_rng([seed, round(1000 * skill)])
    found = []
    for record in records:
        height, width = record.image_size
        limit = np.array([width, height] * 2, dtype=np.float32)
        rows: list[tuple[Any, int, float]] = []
        for box, label in zip(record.target.boxes_xyxy_orig, record.target.labels, strict=True):
            side = np.tile(box[2:] - box[:2], 2)
            for copy in range(1 + int(rng.random() < 0.3)):
                if rng.random() > 0.25 + 0.75 * skill:
                    continue
                near = box + rng.normal(0, 0.3 * (1 - skill) + 0.02, 4) * side
                shown = int(label) if rng.random() < 0.4 + 0.6 * skill else int(rng.integers(1, 21))
                rows.append((near, shown, float(np.clip(rng.normal(0.45 + 0.4 * skill - 0.2 * copy, 0.2), 0.01, 0.99))))
        for _ in range(rng.integers(0, 5)):
            start = rng.random(2) * limit[:2] * 0.7
            box = np.concatenate([start, start + (0.1 + 0.3 * rng.random(2)) * limit[:2]])
            rows.append((box, int(rng.integers(1, 21)), float(rng.beta(1, 4))))
        boxes = np.array([np.clip(box, 0, limit) for box, _, _ in rows], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        labels, scores = [label for _, label, _ in rows], [score for _, _, score in rows]
        found.append(ImageDetections(boxes, np.array(labels, np.int64), np.array(scores, np.float32)))
    return Detections.from_images([record.id for record in records], found)


def _epoch(number: int, config: TrainConfig, val: dict[str, Any]) -> dict[str, Any]:
    epochs = config.recipe.epochs
    share = number / epochs
    losses = {"total": 3 - 2 * share, "detection": 2.5 - 1.8 * share, "gradient_norm": 6.0 - share}
    if config.distillation.source != "none":
        losses |= {"feature": 1.2 - 0.5 * share, "logit": 4 - share}
    reached = val if number == epochs else {**val, "mAP": val["mAP"] * share}
    if config.evaluate == "final-only" and number < epochs:
        reached = None
    seconds = {"training": 10.0 + number % 3, "data_wait": 0.2, "targets": 0.05 * len(losses)}
    return {"epoch": number, "step": 3 * number, "losses": losses, "seconds": seconds, "val": reached}


def _result(config: TrainConfig, history: list[dict[str, Any]], scored: dict[str, Any]) -> dict[str, Any]:
    seconds = {name: sum(line["seconds"][name] for line in history) for name in history[0]["seconds"]}
    return {
        "run_name": config.run_name,
        "config": config.model_dump(mode="json"),
        "targets": {"source": "none"} if config.distillation.source == "none" else _targets(),
        "images": {"train": 12, "val": scored["val"]["images"], "test": scored.get("test", {"images": 0})["images"]},
        "epochs": config.recipe.epochs,
        "steps": history[-1]["step"],
        "processes": 1,
        "last": history[-1],
        "best": max(history, key=lambda line: -1 if line["val"] is None else line["val"]["mAP"]),
        "test": {"last": scored["test"], "best": scored["test"]} if "test" in scored else None,
        "selected_and_reported_on_the_same_images": not config.test_sets,
        "seconds": seconds,
        "seconds_by_epoch": [line["seconds"]["training"] for line in history],
        "data_wait_share": seconds["data_wait"] / seconds["training"],
        "device": "cpu",
        "torch": "2.11.0",
    }


def _targets() -> dict[str, Any]:
    array = {"fingerprint": _FINGERPRINT, "content": _FINGERPRINT, "sample_shape": [30, 30, 24], "dtype": "float16"}
    return {
        "source": "store",
        "teachers": {"features": "tiny_dino", "logits": "tiny_clip"},
        "untrained": ["tiny_dino", "tiny_clip"],
        "identities": {"tiny_dino": {"name": "tiny_dino", "grid": [30, 30]}, "tiny_clip": {"name": "tiny_clip"}},
        "stores": [
            {
                "store": "teachers.zarr",
                "fingerprint": _FINGERPRINT,
                "arrays": {"teachers/tiny_dino/original/features": array},
            }
        ],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
