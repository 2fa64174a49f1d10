"""Memory of training: what each arm takes at its peak, and that a run does not grow from epoch to epoch.

Every figure is that of a process of its own. `RssAnon` is what a process has for itself: mapped shards of a store are
pages of the system's cache, shared with whoever reads them. On a GPU it is what torch has allocated there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.memory import MIB, sampled, status_bytes
from benchmarks.stores import in_fresh_process
from benchmarks.tables import Check, Table, markdown

ARMS = ("baseline", "cached", "live")
# Of the cached arm, in which something could pile up; the others are there for their peaks.
EPOCHS = {"baseline": 2, "cached": 6, "live": 2}
AT_MOST = 1.05
BACKBONE = "mobilenet_v3_small"


def training_memory_tables(
    voc_root: Path, store: Path, folder: Path, teachers: tuple[str, ...], device: str
) -> list[Table]:
    """Return the tables of peaks by arm, and of anonymous memory after the second and the last epoch, in MiB.

    store: of the teachers' targets of eight images at least.  teachers: untrained, for the live arm.
    """
    found = {
        arm: in_fresh_process("training_memory", arm, voc_root, store, folder, ",".join(teachers), device)
        for arm in ARMS
    }
    return [_peaks(found), _growth(found["cached"]["after_epochs"])]


def _peaks(found: dict[str, Any]) -> Table:
    where = {"anonymous": "host, peak"} | ({"gpu": "GPU, peak"} if "gpu" in found["baseline"] else {})
    rows = []
    for arm in ARMS:
        cells = []
        for key in where:
            peak, baseline = found[arm][key], found["baseline"][key]
            cells += [f"{peak / MIB:.0f}", f"{(peak - baseline) / MIB:+.0f}"]
        rows.append([arm, *cells])
    header = ["MiB", *(cell for name in where.values() for cell in (name, "over baseline"))]
    return Table(f"Memory of training by arm, {BACKBONE}, batches of 4", markdown(header, rows))


def _growth(after_epochs: list[int]) -> Table:
    early, late, target = after_epochs[1], after_epochs[-1], f"≤ {AT_MOST}"
    row = ["cached", f"{early / MIB:.0f}", f"{late / MIB:.0f}", f"{late / early:.3f}", target]
    header = ["MiB", "after epoch 2", f"after epoch {len(after_epochs)}", "ratio", "target"]
    check = Check("growth over epochs", late / early, target, late / early <= AT_MOST)
    return Table("Anonymous memory (RssAnon) over epochs", markdown(header, [row]), (check,))


def run(arm: str, voc_root: Path, store: Path, folder: Path, teachers: tuple[str, ...], device: str) -> dict[str, Any]:
    """Return the peaks of a small run, and its anonymous memory after each epoch, in bytes."""
    import torch

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
    distillation = {
        "baseline": Distillation(),
        "cached": Distillation(source="store", stores=(store,)),
        "live": Distillation(source="live", teachers=teachers, untrained=True),
    }[arm]
    config = TrainConfig(
        run_name=arm, voc_root=voc_root, voc_sets=("2007:train",), val_sets=("2007:val",),
        recipe=Recipe(epochs=EPOCHS[arm], batch_size=4), evaluate="final-only", limit=8, workers=0, device=device,
        student=StudentConfig(backbone=BACKBONE, backbone_weights="none"), distillation=distillation,
        runs_dir=folder / "memory-runs", checkpoints_dir=folder / "memory-checkpoints",
    )  # fmt: skip
    with sampled("RssAnon") as seen:
        train(config)
    peaks = {"anonymous": max(seen)}
    if device.startswith("cuda"):
        peaks["gpu"] = torch.cuda.max_memory_allocated(device)
    return {**peaks, "after_epochs": after}


if __name__ == "__main__":
    given = sys.argv[1:]
    print(
        json.dumps(run(given[0], Path(given[1]), Path(given[2]), Path(given[3]), tuple(given[4].split(",")), given[5]))
    )
