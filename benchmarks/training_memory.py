"""Anonymous memory of a training run from a store, which must not grow from epoch to epoch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.memory import MIB, status_bytes
from benchmarks.stores import in_fresh_process
from benchmarks.tables import Check, Table, markdown

EPOCHS = 6
AT_MOST = 1.05


def training_memory_table(voc_root: Path, store: Path, folder: Path) -> Table:
    """Return the table of anonymous memory after the second and the last epoch, in MiB."""
    found = in_fresh_process("training_memory", voc_root, store, folder)["after_epochs"]
    early, late = found[1], found[-1]
    target = f"≤ {AT_MOST}"
    row = ["MobileNetV3-Small, cached", f"{early / MIB:.0f}", f"{late / MIB:.0f}", f"{late / early:.3f}", target]
    header = ["MiB", "after epoch 2", f"after epoch {EPOCHS}", "ratio", "target"]
    check = Check("growth over epochs", late / early, target, late / early <= AT_MOST)
    return Table("Anonymous memory (RssAnon) of training", markdown(header, [row]), (check,))


def run(voc_root: Path, store: Path, folder: Path) -> dict[str, list[int]]:
    """Return the anonymous memory after each epoch of a small run."""
    from pipeline.config import Distillation, Recipe, TrainConfig
    from pipeline.recorder import Recorder
    from pipeline.train import train
    from students.config import StudentConfig

    after: list[int] = []
    real = Recorder.epoch

    def noted(self: Recorder, metrics: dict[str, object]) -> None:
        real(self, metrics)
        after.append(status_bytes("RssAnon"))

    Recorder.epoch = noted  # type: ignore[method-assign]
    train(
        TrainConfig(
            run_name="memory", voc_root=voc_root, voc_sets=("2007:train",), val_sets=("2007:val",),
            recipe=Recipe(epochs=EPOCHS, batch_size=4), evaluate="final-only", limit=8, workers=0, device="cpu",
            student=StudentConfig(backbone="mobilenet_v3_small", backbone_weights="none"),
            distillation=Distillation(source="store", stores=(store,)),
            runs_dir=folder / "memory-runs", checkpoints_dir=folder / "memory-checkpoints",
        )
    )  # fmt: skip
    return {"after_epochs": after}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))))
