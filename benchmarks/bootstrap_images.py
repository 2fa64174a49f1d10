"""Measures the bootstrap over images beside evaluating every resample's images anew, on one core.

    python benchmarks/bootstrap_images.py [--voc-root VOCdevkit --voc-set 2007:test] [--out FILE]

Without `--voc-root` annotations are drawn, as many as VOC2007's test set has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection_sets import PER_IMAGE, made_detections
from benchmarks.drawn_annotations import write_annotations
from benchmarks.tables import Check, Table, machine, markdown, report
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.average_precision import average_precision
from evaluation.bootstrap import bootstrap, draw_weights, weighted_evaluation
from evaluation.detections import Detections
from evaluation.matching import Metric, match_detections

T = TypeVar("T")
METRICS: tuple[Metric, ...] = ("voc", "voc07", "coco")
RESAMPLES = 1000
RULE = (
    "Processor seconds on one core, medians over the rounds. bootstrap: 1,000 resamples, matching included. anew: one"
    " resample's images repeated, matched and averaged, times 1,000; repeating them left out. A ratio is anew over"
    " bootstrap in the same round. apart: the largest difference of any class at any threshold between the two, for the"
    " same resample."
)


def main() -> None:
    """Measure, print the report and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, help="folder that holds VOC2007 (default: drawn annotations)")
    parser.add_argument("--voc-set", default="2007:test", help="images to score (default 2007:test)")
    parser.add_argument("--images", type=int, help="take only the first N images")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every metric (default 3)")
    parser.add_argument("--out", type=Path, help="write the report there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="teachonce-bench-") as folder:
        voc_root = options.voc_root or Path(folder)
        if options.voc_root is None:
            write_annotations(voc_root / "VOCdevkit")
            voc_root /= "VOCdevkit"
        records = read_voc(voc_root, [options.voc_set], options.images)
    detections = made_detections(records)
    facts = [
        *machine(("numpy",)),
        f"load average {os.getloadavg()[0]:.1f} before",
        f"{len(records):,} images, {len(detections):,} detections, {PER_IMAGE} an image; {options.rounds} rounds",
    ]
    text = report(
        f"Bootstrap over images, {date.today().isoformat()}", facts, RULE, [table(detections, records, options.rounds)]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def table(detections: Detections, records: list[ImageRecord], rounds: int) -> Table:
    """Return time, ratio and difference by metric."""
    rows, checks = [], []
    for metric in METRICS:
        ours, anew, apart = [], [], []
        for number in range(rounds):
            print(f"{metric}: round {number + 1} …", file=sys.stderr, flush=True)
            weights = draw_weights(np.random.default_rng(number), len(records), 1)
            again, targets = repeated(detections, records, weights[:, 0])
            seconds, expected = processor_seconds(partial(plain, again, targets, metric))
            anew.append(seconds * RESAMPLES)
            found = weighted_evaluation(detections, records, weights, metric)[0]
            apart.append(float(np.nanmax(np.abs(found - expected))))
            ours.append(processor_seconds(partial(bootstrap, detections, records, metric, resamples=RESAMPLES))[0])
        ratio = median(slow / fast for slow, fast in zip(anew, ours, strict=True))
        rows.append(
            [metric, f"{median(ours):.1f}", f"{median(anew):,.0f}", f"{ratio:.0f}", "≥ 50", f"{max(apart):.0e}"]
        )
        checks.append(Check(f"{metric}: anew over bootstrap", ratio, "≥ 50", ratio >= 50))
        checks.append(Check(f"{metric}: apart", max(apart), "≤ 1e-06", max(apart) <= 1e-6))
    header = ["", "bootstrap, s", "anew, s", "ratio", "target", "apart"]
    return Table("1,000 resamples", markdown(header, rows), tuple(checks))


def repeated(
    detections: Detections, records: list[ImageRecord], weights: NDArray[np.int32]
) -> tuple[Detections, list[ImageRecord]]:
    """Return the set with each image there as often as its weight says, under names of their own."""
    order = sorted(range(len(records)), key=lambda index: records[index].id)
    copies = [(index, copy) for place, index in enumerate(order) for copy in range(weights[place])]
    names = [f"{records[index].id}-{copy}" for index, copy in copies]
    per_image = [detections.of_image(record.id) for record in records]
    again = Detections.from_images(names, [per_image[index] for index, _ in copies])
    return again, [replace(records[index], id=name) for (index, _), name in zip(copies, names, strict=True)]


def plain(detections: Detections, records: list[ImageRecord], metric: Metric) -> NDArray[np.float64]:
    """Return the AP [20, 10] of every class at every threshold by one metric."""
    matches = match_detections(detections, [record.target for record in records], metric).values()
    return np.array([average_precision(m.true_positive, m.ignored, m.num_positives, metric) for m in matches])


def processor_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Return the processor seconds that the work takes, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
