"""Verbs that draw, check and fetch image sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.options import PATH, VOC_ROOT, options
from pipeline.verbs.verb import Verb


@click.command("make-synthetic-voc", cls=Verb)
@options(
    click.argument("folder", type=PATH),
    click.option("--train", "num_train", type=click.IntRange(1), default=64, show_default=True),
    click.option("--val", "num_val", type=click.IntRange(0), default=32, show_default=True),
    click.option("--test", "num_test", type=click.IntRange(0), default=0, show_default=True),
    click.option("--empty", "num_empty", type=click.IntRange(0), default=0, show_default=True,
                 help="Images without objects."),
    click.option("--class", "classes", multiple=True, help="Draw only these classes. [all twenty]"),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
)  # fmt: skip
def make_synthetic_voc(folder: Path, classes: tuple[str, ...], **flags: Any) -> None:
    """Write a devkit of drawn shapes to FOLDER."""
    from data.records import VOC_CLASSES
    from data.synthetic import make_devkit

    made = make_devkit(folder, classes=classes or VOC_CLASSES, **flags)
    click.echo(f"wrote {made}")
    click.echo(f"next: python cli.py extract-teachers --voc-root {made} --teacher tiny_dino --teacher tiny_clip")


@click.command("check-voc", cls=Verb)
@options(
    VOC_ROOT,
    click.option("--voc-set", "voc_sets", multiple=True, default=["2007:trainval"], show_default=True),
    click.option("--annotations-only", is_flag=True, help="Do not decode the images."),
)
def check_voc(voc_root: Path, voc_sets: tuple[str, ...], annotations_only: bool) -> None:
    """List everything that is wrong with image sets.

    Exits 1 where anything is.
    """
    from pipeline.checking import check_with_progress, report_lines

    report = check_with_progress(voc_root, voc_sets, decode=not annotations_only)
    for line in report_lines(report):
        click.echo(line)
    click.get_current_context().exit(1 if any(p.level == "error" for p in report.problems) else 0)


@click.command("download-voc", cls=Verb)
@options(
    VOC_ROOT,
    click.option("--year", type=click.IntRange(2007, 2012), default=2007, show_default=True),
    click.option("--image-set", default="trainval", show_default=True, help="train, val, trainval or test."),
)
def download_voc(voc_root: Path, year: int, image_set: str) -> None:
    """Download Pascal VOC (torchvision's downloader)."""
    from data.download import download_voc as download

    click.echo(f"{download(voc_root, year, image_set)} is there")
