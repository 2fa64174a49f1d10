r"""Measures stage 1, side by side in one run: `python benchmarks/extract_teachers.py [--device cuda] [--out FILE]`.

Without `--voc-root` the images are drawn, at VOC's usual sizes. Teachers have seeded weights, which cost what trained
ones do; give trained ones with `--weights NAME=PATH`. On a GPU:

    python benchmarks/extract_teachers.py --device cuda --precision bfloat16 --voc-root DIR --voc-set 2007:trainval \
        --images 5008 --teacher dinov2_vits14 --teacher dinov2_vitb14 --teacher dinov2_vitl14 --teacher clip_vitb32
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.extraction_memory import extraction_memory_table
from benchmarks.extraction_stages import Setting, stage_tables
from benchmarks.tables import Table, machine, report
from benchmarks.teacher_speed import batch_table, precision_table, variant_table
from data.synthetic import make_devkit
from data.voc import read_voc
from pipeline.device import choose_device
from pipeline.extract import workers_for
from pipeline.teachers import TeacherChoices, build_teachers

PACKAGES = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "numpy", "pillow")
RULE = (
    "A round runs every line of a table once, in an order drawn anew, on the same images, already in the page cache."
    " `pipeline` is the extraction itself, from the first decoded image to the last flushed shard, both views; building"
    " teachers and hashing images are not in it. `teacher alone` runs the same batches from the device's own memory;"
    " `decode + resize alone` is the loader with the same number of workers; `bytes ÷ disk` is the time of a plain"
    " write + fsync of as many bytes. The ratio is the pipeline over the slowest of these three in the same round."
)


def main() -> None:
    """Measure, print the report and write it where asked."""
    options = arguments()
    device = choose_device(options.device)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="teachonce-bench-", dir=options.folder) as name:
        tables = measure(Path(name), options, device)
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    facts = [
        *machine(PACKAGES),
        *gpu,
        f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        f"{options.images} images of {options.voc_set if options.voc_root else 'a drawn devkit'},"
        f" {options.rounds} rounds, {options.precision}, {workers_for(options.workers, device)} decoding workers",
    ]
    text = report(f"Running teachers into a store, {date.today().isoformat()}", facts, RULE, tables)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--teacher", dest="teachers", action="append", help="repeat for several")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=PATH", help="trained weights")
    parser.add_argument("--voc-root", type=Path, help="real images (default: drawn ones)")
    parser.add_argument("--voc-set", default="2007:train")
    parser.add_argument("--images", type=int, default=32, help="number of images (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every table (default 3)")
    parser.add_argument("--workers", type=int, help="decoding processes")
    parser.add_argument("--folder", type=Path, help="where to put stores: the disk to measure (default: temporary)")
    parser.add_argument("--only-stages", action="store_true", help="only the pipeline beside its parts")
    parser.add_argument("--out", type=Path, help="write the report there too")
    options = parser.parse_args()
    options.teachers = options.teachers or ["dinov2_vits14", "clip_vitb32"]
    return options


def measure(folder: Path, options: argparse.Namespace, device: torch.device) -> list[Table]:
    """Return all tables."""
    voc_root = options.voc_root or make_devkit(folder / "devkit", num_train=options.images, num_val=0)
    records = read_voc(voc_root, (options.voc_set,), options.images)
    weights = {name: Path(path) for name, _, path in (pair.partition("=") for pair in options.weights)}
    choices = TeacherChoices(weights, untrained=True, precision=options.precision)
    teachers = build_teachers(options.teachers, choices, device)
    setting = Setting(folder, records, device, workers_for(options.workers, device), options.rounds)
    tables = stage_tables(setting, teachers)
    if options.only_stages:
        return tables
    say("batch sizes")
    tables.append(batch_table(teachers, setting))
    say("variants")
    tables.append(variant_table(next(iter(teachers.values())), setting))
    del teachers
    say("precision")
    tables.append(precision_table(options.teachers, weights, setting))
    say("memory")
    return [*tables, extraction_memory_table(folder)]


def say(what: str) -> None:
    """Tell what is being done."""
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
