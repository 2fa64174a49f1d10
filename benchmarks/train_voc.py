"""Trains on Pascal VOC from random initialisation: baseline beside feature and logit KD from a store, same seed.

`python benchmarks/train_voc.py --voc-root DIR [--device cuda] [--epochs 60] [--out FILE]`. Teachers have seeded
weights, so the curves say what training costs and that it learns, and nothing of KD; a cached step costs the same with
trained ones. `--limit`, `--epochs`, `--backbone` and the teachers make it small enough to be tried on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.rounds import in_turn
from benchmarks.tables import Check, Table, machine, markdown, report
from benchmarks.train_step import AT_MOST_CACHED, AT_MOST_WAIT, PACKAGES, Bench, say, step_of
from data.voc import read_voc
from pipeline.config import Recipe
from pipeline.device import choose_device
from pipeline.evaluate import score_student
from pipeline.extract import ExtractConfig, extract
from pipeline.randomness import torch_stream
from pipeline.train import train, training_workers
from students.detector import build_student

ARMS = ("baseline", "cached")
MAX_ROWS = 20
RULE = (
    "Both arms see the same images in the same order and start from the same weights. Cached: MSE on features and KL on"
    " logits, targets read from the store. TEACHERS ARE UNTRAINED: the curves say nothing of KD. Seconds a step are"
    " those of whole epochs, loading and waiting included, medians over epochs. The live arm takes the same step on one"
    " decoded batch, teachers run in it; a round takes it once after the other, in an order drawn anew."
)


def main() -> None:
    """Train, print the report and write it where asked."""
    options = parsed()
    device = choose_device(options.device)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="teachonce-voc-") as name:
        folder = Path(name)
        teachers = (options.feature_teachers[0], options.logit_teacher)
        say(f"extracting {', '.join(teachers)}")
        bench = bench_of(options, folder, teachers, device, options.limit)
        results = {arm: trained(bench, options, arm) for arm in ARMS}
        tables = [curve_table(results, untrained_score(bench, options)), speed_table(results)]
        tables.append(live_table(options, folder, device))
    images = results["baseline"]["images"]
    facts = [
        *machine(PACKAGES),
        *([torch.cuda.get_device_name(device)] if device.type == "cuda" else []),
        f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        f"{options.backbone}, random initialisation; {options.voc_set}, {images['train']} images,"
        f" validated on {options.val_set}, {images['val']}",
        f"{options.epochs} epochs, batches of {options.batch_size}, AMP {options.amp}",
        f"UNTRAINED teachers: {', '.join(results['cached']['targets']['untrained'])}",
    ]
    text = report(f"Training on Pascal VOC, {date.today().isoformat()}", facts, RULE, tables)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="the folder that holds VOC2007")
    parser.add_argument("--voc-set", default="2007:train")
    parser.add_argument("--val-set", default="2007:val")
    parser.add_argument("--limit", type=int, help="first N training images")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="(default: the recipe's)")
    parser.add_argument("--amp", choices=["none", "bfloat16", "float16"], default="none")
    parser.add_argument("--evaluate-every", choices=["every-epoch", "final-only"], default="every-epoch")
    parser.add_argument("--feature-teachers", nargs="+", default=["dinov2_vits14", "dinov2_vitb14"],
                        help="the first is distilled in training; all of them in the live step")  # fmt: skip
    parser.add_argument("--logit-teacher", default="clip_vitb32")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each arm against live teachers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="write the report there too")
    return parser.parse_args()


def bench_of(
    options: argparse.Namespace, folder: Path, teachers: tuple[str, ...], device: torch.device, limit: int | None
) -> Bench:
    """Return what the arms share, with a store of the teachers' targets of the first so many training images."""
    store = folder / f"{teachers[0].replace(':', '-')}-{limit}.zarr"
    extract(
        ExtractConfig(
            voc_root=options.voc_root, voc_sets=(options.voc_set,), out=store, teachers=teachers, untrained=True,
            limit=limit, device=options.device,
        )
    )  # fmt: skip
    return Bench(
        options.voc_root, folder, store, device, options.batch_size, options.rounds, teachers,
        (options.voc_set,), (options.val_set,),
    )  # fmt: skip


def trained(bench: Bench, options: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Return the result of an arm's run, with its history."""
    say(f"training, {arm}")
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, amp=options.amp, learning_rate=options.learning_rate
    )
    config = bench.config(
        options.backbone, arm, run_name=arm, recipe=recipe, limit=options.limit, evaluate=options.evaluate_every,
        cache_images=bench.folder / "images.zarr", pictures=0,
    )  # fmt: skip
    result = train(config)
    lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {**result, "history": [json.loads(line) for line in lines]}


def untrained_score(bench: Bench, options: argparse.Namespace) -> float | None:
    """Return AP@0.50 of the student before its first step: what chance comes to."""
    config = bench.config(options.backbone, "baseline")
    with torch_stream(config.seed, "student-init"):
        student = build_student(config.student)
    records = read_voc(bench.voc_root, config.val_sets)
    workers = training_workers(config.workers, bench.device)
    _, scored = score_student(student.to(bench.device).eval(), records, bench.device, workers=workers)
    return scored.per_iou["0.50"]


def curve_table(results: dict[str, dict[str, Any]], untrained: float | None) -> Table:
    """Return AP@0.50 and mAP of the validation images by epoch, evenly chosen where there are many."""
    scored = [line["epoch"] for line in results["baseline"]["history"] if line["val"] is not None]
    every = -(-len(scored) // MAX_ROWS)
    shown = sorted({*scored[every - 1 :: every], scored[-1]})
    rows = [["0, untrained", _percent(untrained), "", "", ""]]
    for epoch in shown:
        cells = [str(epoch)]
        for arm in ARMS:
            line = results[arm]["history"][epoch - 1]
            cells += [_percent(line["val"]["per_iou"]["0.50"]), _percent(line["val"]["mAP"])]
        rows.append(cells)
    header = ["epoch", "baseline AP50", "mAP", "cached AP50", "mAP"]
    return Table("Validation images by epoch, percent", markdown(header, rows))


def speed_table(results: dict[str, dict[str, Any]]) -> Table:
    """Return seconds a step and what share of the training time was waited for."""
    steps = {arm: result["steps"] / result["epochs"] for arm, result in results.items()}
    a_step = {arm: median(result["seconds_by_epoch"]) / steps[arm] for arm, result in results.items()}
    rows, checks = [], []
    for arm, result in results.items():
        seconds, ratio = result["seconds"], a_step[arm] / a_step["baseline"]
        waiting, targets = (seconds[name] / max(seconds["training"], 1e-9) for name in ("data_wait", "targets"))
        rows.append([arm, f"{1000 * a_step[arm]:.0f}", f"{ratio:.3f}", f"{waiting:.2%}", f"{targets:.2%}"])
        checks.append(Check(f"{arm}, waiting for images", waiting, f"< {AT_MOST_WAIT}", waiting < AT_MOST_WAIT))
    cached = a_step["cached"] / a_step["baseline"]
    checks.append(Check("cached over baseline", cached, f"≤ {AT_MOST_CACHED}", cached <= AT_MOST_CACHED))
    header = ["", "ms a step", "over baseline", "waiting for images", "getting targets"]
    title = f"Steps (targets: ≤ {AT_MOST_CACHED} over baseline, < {AT_MOST_WAIT:.0%} waiting for images)"
    return Table(title, markdown(header, rows), tuple(checks))


def live_table(options: argparse.Namespace, folder: Path, device: torch.device) -> Table:
    """Return seconds of a cached and of a live step, one batch, for every feature teacher."""
    rows = []
    for teacher in options.feature_teachers:
        say(f"steps with {teacher}, cached and live")
        teachers = (teacher, options.logit_teacher)
        bench = bench_of(options, folder, teachers, device, options.batch_size)
        steps = {arm: step_of(bench, options.backbone, arm) for arm in ("cached", "live")}
        for step in steps.values():
            step(0)  # the first one allocates
        found = in_turn(steps, options.rounds)
        ratio = median([live / cached for live, cached in zip(found["live"], found["cached"], strict=True)])
        rows.append([" + ".join(teachers), *(f"{1000 * median(found[arm]):.0f}" for arm in steps), f"{ratio:.2f}"])
    return Table("A step against live teachers", markdown(["", "cached, ms", "live, ms", "live/cached"], rows))


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.2f}"


if __name__ == "__main__":
    main()
