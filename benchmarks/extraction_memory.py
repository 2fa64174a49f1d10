"""Peak anonymous memory of a whole extraction, which must not grow with the number of images."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.memory import MIB, sampled
from benchmarks.stores import in_fresh_process
from benchmarks.tables import Check, Table, markdown
from data.synthetic import make_devkit

COUNTS = (500, 5_000)
AT_MOST = 1.1
TEACHERS = ("tiny_dino", "tiny_clip")


def extraction_memory_table(folder: Path) -> Table:
    """Return the table of peak anonymous memory, in MiB, of few and of many images."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        voc_root = make_devkit(Path(name) / "devkit", num_train=max(COUNTS), num_val=0)
        few, many = (in_fresh_process("extraction_memory", voc_root, Path(name), count)["peak"] for count in COUNTS)
    row = ["extraction, peak", f"{few / MIB:.1f}", f"{many / MIB:.1f}", f"{many / few:.2f}", f"≤ {AT_MOST}"]
    header = ["MiB", *(f"N = {count:,}" for count in COUNTS), "ratio", "target"]
    check = Check("extraction, peak", many / few, f"≤ {AT_MOST}", many / few <= AT_MOST)
    return Table("Anonymous memory (RssAnon) of extracting", markdown(header, [row]), (check,))


def run(voc_root: Path, folder: Path, count: int) -> dict[str, int]:
    """Return the peak of an extraction of the first so many images by the embedded teachers, one view."""
    from pipeline.extract import ExtractConfig, extract

    config = ExtractConfig(
        voc_root=voc_root, voc_sets=("2007:train",), out=folder / f"{count}.zarr", teachers=TEACHERS,
        views=("original",), batch_size=16, workers=0, device="cpu", limit=count,
    )  # fmt: skip
    with sampled("RssAnon") as found:
        extract(config)
    return {"peak": max(found)}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
