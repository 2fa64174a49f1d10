"""`demo`: the whole pipeline on a synthetic devkit, in one process, in a few minutes on two cores.

It uses the real default teachers where their weights are in the local hub cache or the hub answers within three
seconds, else the embedded ones, and says which.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data.errors import UsageError
from data.hub import hub_answers
from data.synthetic import make_devkit
from data.voc import read_voc
from evaluation.table import result_table
from features.registry import is_available_locally
from pipeline.config import Distillation, Recipe, TrainConfig
from pipeline.extract import ExtractConfig, extract
from pipeline.inspection import heatmap, inspect_store, summary_table
from pipeline.progress import say
from pipeline.results import runs_table
from pipeline.scoring import ScoreRequest, score
from pipeline.teachers import DEFAULT_TEACHERS
from pipeline.train import train
from students.config import StudentConfig

EMBEDDED_TEACHERS = ("tiny_dino", "tiny_clip")
MARKER = "made-by-teachonce-demo"
CLASSES = ("bird", "bottle", "car", "cat", "dog", "person")
_NUM_TRAIN, _NUM_VAL, _EPOCHS = 32, 16, 6
_NUM_PICTURES = 4


def run_demo(out: Path, device: str) -> list[Any]:
    """Make everything below `out` anew and return what to print at the end.

    Raises UsageError where `out` holds something that the demo did not make.
    """
    _clear(out)
    teachers, said = choose_teachers()
    say(said)
    voc_root = make_devkit(out / "VOCdevkit", num_train=_NUM_TRAIN, num_val=_NUM_VAL, classes=CLASSES)
    store = out / "teachers.zarr"
    extract(ExtractConfig(voc_root=voc_root, voc_sets=("2007:train",), out=store, teachers=teachers, device=device))
    results = []
    for name, distillation in _arms(store).items():
        say(f"training the run {name}")
        results.append(train(_config(out, voc_root, device, name, distillation)))
    scored, notes = score(
        ScoreRequest(
            checkpoint=out / "checkpoints" / "cached-kd" / "student_latest.pth",
            detections=None,
            device=device,
            save_detections=out / "detections",
            visualize=_NUM_PICTURES,
            out=out / "pictures",
        )
    )
    first = read_voc(voc_root, ("2007:train",), 1)[0].id
    picture = out / "pictures" / "teacher-heatmap.png"
    picture.write_bytes(heatmap(store, first, voc_root))
    return [
        "",
        summary_table(inspect_store(store, verify=True)),
        "",
        result_table(scored),
        "",
        runs_table(results, f"{_NUM_TRAIN} synthetic images, MobileNetV3-Small, {_EPOCHS} epochs, percent"),
        *notes,
        f"teacher heatmap: {picture}",
        said,
        "This shows that the parts work together; six epochs on drawn shapes say nothing of distillation.",
        f"next: tensorboard --logdir {out / 'runs'}   or the README's tour with real images",
    ]


def choose_teachers() -> tuple[tuple[str, ...], str]:
    """Return the teachers that can be had here, and that in plain words."""
    if all(is_available_locally(name) for name in DEFAULT_TEACHERS):
        return DEFAULT_TEACHERS, f"Teachers: {', '.join(DEFAULT_TEACHERS)}, trained, from the local hub cache."
    if hub_answers():
        return DEFAULT_TEACHERS, f"Teachers: {', '.join(DEFAULT_TEACHERS)}, trained, from the hub."
    return EMBEDDED_TEACHERS, (
        f"Teachers: {' and '.join(EMBEDDED_TEACHERS)}, embedded and UNTRAINED: the real ones are not in the local hub"
        " cache, and the hub does not answer."
    )


def _arms(store: Path) -> dict[str, Distillation]:
    return {"baseline": Distillation(), "cached-kd": Distillation(source="store", stores=(store,))}


def _config(out: Path, voc_root: Path, device: str, name: str, distillation: Distillation) -> TrainConfig:
    return TrainConfig(
        run_name=name,
        voc_root=voc_root,
        voc_sets=("2007:train",),
        val_sets=("2007:val",),
        student=StudentConfig(backbone="mobilenet_v3_small", backbone_weights="none"),
        recipe=Recipe(epochs=_EPOCHS, batch_size=4, learning_rate=0.02),
        distillation=distillation,
        evaluate="final-only",
        device=device,
        workers=0,
        runs_dir=out / "runs",
        checkpoints_dir=out / "checkpoints",
    )


def _clear(out: Path) -> None:
    if out.exists():
        if any(out.iterdir()) and not (out / MARKER).is_file():
            raise UsageError(f"{out}: holds something that the demo did not make", hint="give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("`python cli.py demo` deletes and remakes this folder.\n", encoding="utf-8")
