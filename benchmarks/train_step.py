"""Measures a training step: baseline, cached and live distillation side by side, for the three students.

`python benchmarks/train_step.py [--device cuda] [--out FILE]`. Without `--voc-root` the images are drawn. Teachers and
students have seeded weights: a step costs the same with trained ones.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.rounds import Pass, in_turn, timed
from benchmarks.tables import Check, Table, machine, markdown, report
from benchmarks.training_memory import training_memory_tables
from data.geometry import VIEWS
from data.synthetic import make_devkit
from data.voc import read_voc
from pipeline.config import Distillation, Recipe, TrainConfig
from pipeline.dataset import LoadedBatch, SampleKey, TrainingImages, collate_loaded
from pipeline.device import choose_device
from pipeline.extract import ExtractConfig, extract
from pipeline.train import target_source, train
from pipeline.trainer import Trainer
from students.config import StudentConfig

PACKAGES = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "numpy")
STUDENTS = ("resnet18", "mobilenet_v3_small", "vit_tiny")
TEACHERS = ("dinov2_vits14", "clip_vitb32")
AT_MOST_CACHED = 1.05
AT_MOST_WAIT = 0.02
RULE = (
    "A round takes one step of every arm, in an order drawn anew, on the same batch, already decoded; a step is"
    " forward, losses, backward, clipping and the optimiser's. Cached: MSE on features and KL on logits, targets read"
    " from the store in the step. Live: the same losses, teachers run in the step. Ratios are of the same round,"
    " medians."
)


@dataclass(frozen=True)
class Bench:
    """What all arms share. store: of the teachers' targets."""

    voc_root: Path
    folder: Path
    store: Path
    device: torch.device
    batch_size: int
    rounds: int
    teachers: tuple[str, ...] = TEACHERS
    voc_sets: tuple[str, ...] = ("2007:train",)
    val_sets: tuple[str, ...] = ("2007:val",)

    def config(self, backbone: str, arm: str, **changes: object) -> TrainConfig:
        """Return the configuration of an arm: baseline, cached or live."""
        distillation = {
            "baseline": Distillation(),
            "cached": Distillation(source="store", stores=(self.store,)),
            "live": Distillation(source="live", teachers=self.teachers, untrained=True),
        }[arm]
        settings: dict[str, object] = {
            "run_name": f"{backbone.replace(':', '-')}-{arm}", "voc_root": self.voc_root, "voc_sets": self.voc_sets,
            "val_sets": self.val_sets, "recipe": Recipe(batch_size=self.batch_size), "distillation": distillation,
            "student": StudentConfig(backbone=backbone, backbone_weights="none"), "device": str(self.device),
            "runs_dir": self.folder / "runs", "checkpoints_dir": self.folder / "checkpoints",
        }  # fmt: skip
        return TrainConfig.model_validate({**settings, **changes}).resolved()


def main() -> None:
    """Measure, print the report and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="training images (default 16)")
    parser.add_argument("--voc-root", type=Path, help="a devkit with 2007:train and 2007:val (default: drawn)")
    parser.add_argument("--out", type=Path, help="write the report there too")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(prefix="teachonce-bench-") as name:
        folder = Path(name)
        voc_root = options.voc_root or make_devkit(folder / "devkit", num_train=options.images, num_val=4)
        store = extract(
            ExtractConfig(
                voc_root=voc_root, voc_sets=("2007:train",), out=folder / "s.zarr", teachers=TEACHERS, untrained=True,
                limit=options.images, device=options.device,
            )
        ).store  # fmt: skip
        bench = Bench(voc_root, folder, store, device, options.batch_size, options.rounds)
        memory = training_memory_tables(voc_root, store, folder, TEACHERS, str(device))
        tables = [step_table(bench), wait_table(bench, options.images), *memory]
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    facts = [
        *machine(PACKAGES),
        *gpu,
        f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        f"batches of {options.batch_size}, {options.rounds} rounds",
    ]
    text = report(f"Training steps, {date.today().isoformat()}", facts, RULE, tables)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def step_table(bench: Bench) -> Table:
    """Return the table of seconds a step, by student and arm."""
    rows, checks = [], []
    for backbone in STUDENTS:
        say(backbone)
        steps = {arm: step_of(bench, backbone, arm) for arm in ("baseline", "cached", "live")}
        for step in steps.values():
            step(0)  # the first one allocates
        found = in_turn(steps, bench.rounds)
        cached = median([mine / base for mine, base in zip(found["cached"], found["baseline"], strict=True)])
        speed_up = median([a / b for a, b in zip(found["live"], found["cached"], strict=True)])
        seconds = [f"{median(found[arm]):.2f}" for arm in steps]
        target = f"≤ {AT_MOST_CACHED}"
        rows.append([backbone, *seconds, f"{cached:.3f}", target, f"{speed_up:.2f}"])
        checks.append(Check(f"{backbone}, cached over baseline", cached, target, cached <= AT_MOST_CACHED))
    header = ["", "baseline", "cached", "live", "cached/b", "target", "live/c"]
    return Table("Seconds a step, and ratios to baseline and cached", markdown(header, rows), tuple(checks))


def step_of(bench: Bench, backbone: str, arm: str) -> Pass:
    """Return what takes one step of an arm on the first images, already decoded, and returns its seconds."""
    config = bench.config(backbone, arm)
    records = read_voc(bench.voc_root, config.voc_sets)[: bench.batch_size]
    source = target_source(config, records, bench.device)
    trainer = Trainer(config, records, bench.device, source)
    images = TrainingImages(records, teacher_inputs=() if source is None else source.teacher_inputs)
    keys = [SampleKey(index, VIEWS[index % 2], 0) for index in range(len(records))]
    loaded: LoadedBatch = collate_loaded([images.load(key) for key in keys])

    def run(_: int) -> float:
        trainer.step = 1  # no report: its extra gradients are taken every `report_steps` only
        return timed(lambda: trainer.run_step([loaded], len(records)))

    return run


def wait_table(bench: Bench, images: int) -> Table:
    """Return what share of an epoch's training a run waits for images and for targets."""
    rows, checks = [], []
    for arm in ("baseline", "cached"):
        say(f"an epoch, {arm}")
        config = bench.config(
            "resnet18", arm, run_name=f"epoch-{arm}", evaluate="final-only", limit=images,
            recipe=Recipe(batch_size=bench.batch_size, epochs=1), report_steps=1000,
        )  # fmt: skip
        seconds = train(config)["seconds"]
        waiting, targets = (seconds[name] / seconds["training"] for name in ("data_wait", "targets"))
        rows.append([arm, f"{seconds['training']:.1f}", f"{waiting:.2%}", f"{targets:.2%}", f"< {AT_MOST_WAIT:.0%}"])
        checks.append(Check(f"{arm}, waiting for images", waiting, f"< {AT_MOST_WAIT}", waiting < AT_MOST_WAIT))
    header = ["", "training, s", "waiting for images", "getting targets", "target"]
    return Table("Waiting for data, one epoch of ResNet-18", markdown(header, rows), tuple(checks))


def say(what: str) -> None:
    """Tell what is being done."""
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
