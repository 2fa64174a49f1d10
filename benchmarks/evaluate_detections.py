"""Measures scoring of detections beside pycocotools, faster-coco-eval and torchmetrics, files read.

    python benchmarks/evaluate_detections.py [--voc-root VOCdevkit --voc-set 2007:test] [--out FILE]

Without `--voc-root` annotations are drawn, as many as VOC2007's test set has. It takes some ten minutes, most of it for
the slow transcript of the devkit's rule that `voc` is compared with (`--images N` takes fewer).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection_sets import PER_IMAGE, made_detections
from benchmarks.drawn_annotations import write_annotations
from benchmarks.evaluators import CONTENDERS
from benchmarks.stores import in_fresh_process
from benchmarks.tables import Check, Table, machine, markdown, report
from data.records import LABEL_OF_CLASS, VOC_CLASSES, ImageRecord, Target
from data.voc import list_ids, read_voc
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.detection_files import read_detections, write_detections
from evaluation.detections import Detections
from evaluation.matching import IOU_THRESHOLDS
from evaluation.written_ids import number

PACKAGES = ("numpy", "pycocotools", "faster-coco-eval", "torchmetrics", "torch")
OURS, FASTER = "ours, COCO's results", "faster-coco-eval"
AT_MOST_DIFFERENCE = 1e-6
RULE = (
    "Every line is a process of its own, once a round, in an order drawn anew; seconds are processor seconds of all its"
    " threads, as on one core that nothing else uses, medians over the rounds, imports left out. read: ground truth"
    " (ours: the devkit's annotations; others: one COCO file made of them, which is no work of theirs) and detections."
    " score: ten IoU thresholds, each tool with its defaults; ours gives three definitions, per class and by size. A"
    " ratio is the line's read + score over that of the first line in the same round. MiB is the peak beyond what the"
    " imports took. COCO's tools overwrite `ignore`, so difficult objects are left out of their ground truth; `coco`"
    " is compared without them, too."
)


@dataclass(frozen=True)
class Case:
    """What is scored. folder: holds it in every contender's format."""

    folder: Path
    records: list[ImageRecord]
    detections: Detections


def main() -> None:
    """Measure, print the report and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, help="folder that holds VOC2007 (default: drawn annotations)")
    parser.add_argument("--voc-set", default="2007:test", help="images to score (default 2007:test)")
    parser.add_argument("--images", type=int, help="take only the first N images")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every contender (default 5)")
    parser.add_argument("--out", type=Path, help="write the report there too")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="teachonce-bench-") as name:
        case = make_case(Path(name), options.voc_root, options.voc_set, options.images)
        tables = [time_table(case, options.rounds), agreement_table(case)]
    objects = sum(len(record.target) for record in case.records)
    facts = [
        *machine(PACKAGES),
        f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        f"{len(case.records):,} images ({'drawn' if options.voc_root is None else 'VOC' + options.voc_set}),"
        f" {objects:,} objects, {len(case.detections):,} detections, {PER_IMAGE} an image; rounds: {options.rounds}",
    ]
    text = report(f"Scoring detections, {date.today().isoformat()}", facts, RULE, tables)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def make_case(folder: Path, voc_root: Path | None, voc_set: str, images: int | None) -> Case:
    """Write the devkit, its COCO file and the detections in both formats below a folder."""
    if voc_root is None:
        voc_set = "2007:test"
        write_annotations(folder / "VOCdevkit")
    else:
        (folder / "VOCdevkit").symlink_to(voc_root.resolve(), target_is_directory=True)
    if images is not None:
        voc_set = shorter_set(folder, voc_set, images)
    (folder / "set.txt").write_text(voc_set)
    records = read_voc(folder / "VOCdevkit", [voc_set])
    detections = made_detections(records)
    (folder / "truth.json").write_text(json.dumps(coco_truth(without_difficult(records))))
    write_detections(detections, folder / "found.json")
    write_detections(detections, folder / "found")
    return Case(folder, records, detections)


def shorter_set(folder: Path, voc_set: str, images: int) -> str:
    """Return the name of a set of the first images, in a devkit of links beside the given one."""
    whole = (folder / "VOCdevkit").rename(folder / "whole")
    ids = list_ids(whole, [voc_set])[:images]
    devkit = folder / "VOCdevkit" / ids[0].split("/")[0]
    (devkit / "ImageSets" / "Main").mkdir(parents=True)
    (devkit / "Annotations").symlink_to((whole / devkit.name / "Annotations").resolve(), target_is_directory=True)
    (devkit / "ImageSets" / "Main" / "first.txt").write_text("".join(f"{i.split('/')[1]}\n" for i in ids))
    return f"{voc_set.partition(':')[0]}:first"


def without_difficult(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the records without their difficult objects."""
    return [replace(record, target=_ordinary(record.target)) for record in records]


def _ordinary(target: Target) -> Target:
    kept = ~target.difficult
    return Target(target.boxes_xyxy_orig[kept], target.labels[kept], target.difficult[kept])


def coco_truth(records: Sequence[ImageRecord]) -> dict[str, object]:
    """Return the records as COCO's ground truth."""
    annotations: list[dict[str, object]] = []
    for record in records:
        for box, label in zip(record.target.boxes_xyxy_orig.tolist(), record.target.labels.tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number(record.id), "category_id": label, "iscrowd": 0,
                 "bbox": [box[0], box[1], width, height], "area": width * height}
            )  # fmt: skip
    return {
        "images": [
            {"id": number(record.id), "height": record.image_size[0], "width": record.image_size[1]}
            for record in records
        ],
        "categories": [{"id": label, "name": name} for name, label in LABEL_OF_CLASS.items()],
        "annotations": annotations,
    }


def time_table(case: Case, rounds: int) -> Table:
    """Return the table of time and memory."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for round_number in range(rounds):
        for name in np.random.default_rng(round_number).permutation(list(CONTENDERS)).tolist():
            say(f"round {round_number + 1}: {name}")
            found[name].append(in_fresh_process("evaluators", name, case.folder))
    rows, checks = [], []
    for name, runs in found.items():
        ratios = [
            (run["read"] + run["score"]) / (ours["read"] + ours["score"])
            for run, ours in zip(runs, found[OURS], strict=True)
        ]
        middle = {key: median(run[key] for run in runs) for key in ("read", "score", "peak_mib")}
        total = median(run["read"] + run["score"] for run in runs)
        target = "≥ 1" if name == FASTER else ""
        rows.append(
            [name, *(f"{middle[key]:.2f}" for key in ("read", "score")), f"{total:.2f}", f"{median(ratios):.2f}",
             target, f"{middle['peak_mib']:.0f}"]
        )  # fmt: skip
        if target:
            checks.append(Check(f"{name}, read + score", median(ratios), target, median(ratios) >= 1))
            scores = [run["score"] / ours["score"] for run, ours in zip(runs, found[OURS], strict=True)]
            checks.append(Check(f"{name}, score alone", median(scores), target, median(scores) >= 1))
    header = ["", "read, s", "score, s", "both, s", "ratio", "target", "MiB"]
    return Table("Time and memory", markdown(header, rows), tuple(checks))


def agreement_table(case: Case) -> Table:
    """Return how far our figures are from others': the largest difference over classes and thresholds, and of mAP."""
    say("comparing with pycocotools and the transcript of the devkit's rule")
    ordinary = without_difficult(case.records)
    # As pycocotools reads them: from the file.
    detections, _ = read_detections(case.folder / "found.json", case.records)
    ours = {"coco": evaluate(detections, ordinary, "coco")}
    ours |= {name: evaluate(detections, case.records, name) for name in ("voc", "voc07")}
    theirs = {"coco": ("pycocotools", pycocotools_table(case.folder))}
    theirs |= {name: ("transcript", table) for name, table in transcript_tables(detections, case.records).items()}
    rows, checks = [], []
    for name, (referee, table) in theirs.items():
        result = ours[name]
        apart = differences(result, table)
        rows.append([name, referee, f"{result.mAP:.6f}", *(f"{value:.1e}" for value in apart), "≤ 1e-06"])
        checks.append(Check(f"{name} against {referee}", max(apart), "≤ 1e-06", max(apart) <= AT_MOST_DIFFERENCE))
    header = ["", "referee", "our mAP", "mAP apart", "a class apart", "target"]
    return Table("Agreement", markdown(header, rows), tuple(checks))


def differences(result: EvaluationResult, table: NDArray[np.float64]) -> tuple[float, float]:
    """Return how far mAP and the farthest class's mean AP are from a table [20, 10], NaN for no ground truth."""
    of_class = np.array([np.nan if (v := result.per_class[name]["mAP"]) is None else v for name in VOC_CLASSES])
    assert result.mAP is not None
    return abs(result.mAP - float(np.nanmean(table))), float(np.nanmax(np.abs(of_class - table.mean(axis=1))))


def pycocotools_table(folder: Path) -> NDArray[np.float64]:
    """Return pycocotools' AP [20, 10] by class and threshold, NaN without ground truth."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        run = COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, -1].mean(axis=1).T
    return np.where(precision < 0, np.nan, precision)


def transcript_tables(detections: Detections, records: Sequence[ImageRecord]) -> dict[str, NDArray[np.float64]]:
    """Return AP [20, 10] of both averages by the tests' slow transcript of the devkit's rule."""
    from tests.evaluation.devkit_transcript import devkit_area, devkit_eleven_points, transcript

    targets = [record.target for record in records]
    tables = {name: np.full((len(VOC_CLASSES), len(IOU_THRESHOLDS)), np.nan) for name in ("voc", "voc07")}
    for row, label in enumerate(LABEL_OF_CLASS.values()):
        texts, positives = transcript(detections, targets, label)
        if positives:
            tables["voc"][row] = [devkit_area(text, positives) for text in texts]
            tables["voc07"][row] = [devkit_eleven_points(text, positives) for text in texts]
    return tables


def say(what: str) -> None:
    """Tell what is being done."""
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
