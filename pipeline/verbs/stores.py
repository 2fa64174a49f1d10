"""Verbs that make, show and derive stores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from data.errors import UsageError
from pipeline.options import DEVICE, JSON, PATH, UNTRAINED, VOC_ROOT, WEIGHTS, WORKERS, options
from pipeline.verbs.verb import Verb, print_rich


@click.command(cls=Verb)
@JSON
def teachers(as_json: bool) -> None:
    """List the teachers.

    What each gives, its size, grid and licence, and whether its weights are in the local hub cache.
    """
    from pipeline.teacher_list import closing_lines, list_teachers, teachers_table

    listed = list_teachers()
    if as_json:
        click.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    print_rich(teachers_table(listed), *closing_lines(listed))


@click.command("extract-teachers", cls=Verb)
@options(
    VOC_ROOT,
    click.option("--voc-set", "voc_sets", multiple=True, default=["2007:train"], show_default=True, help="Image set."),
    click.option("--out", type=PATH, default="data/teachers.zarr", show_default=True, help="The store."),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        default=["dinov2_vits14", "clip_vitb32"],
        show_default=True,
        metavar="NAME|KEY=SPEC",
        help="Teacher; repeat for several.",
    ),
    click.option(
        "--view", "views", multiple=True, type=click.Choice(["original", "hflip"]), default=["original", "hflip"],
        show_default=True, help="View; repeat for several.",
    ),
    click.option("--dtype", type=click.Choice(["float16", "float32", "int8"]), default="float16", show_default=True,
                 help="Stored dtype of features."),
    click.option("--format", type=click.Choice(["zarr", "hdf5"]),
                 help="Container of a new store. [hdf5 for .h5 and .hdf5, else zarr]"),
    click.option("--shard-samples", type=click.IntRange(1, 65536), default=64, show_default=True,
                 help="Images a shard file holds."),
    click.option("--batch-size", type=click.IntRange(1), help="Images a teacher sees at once; recorded. [16]"),
    WORKERS,
    DEVICE,
    WEIGHTS,
    UNTRAINED,
    click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                 show_default=True, help="What teachers compute in; part of their identity."),
    click.option("--prompts", type=PATH, metavar="FILE", help="Templates and class names for CLIP teachers (YAML)."),
    click.option("--limit", type=click.IntRange(1), help="First N images only."),
    click.option("--repair", is_flag=True, help="Verify every byte first; write what is damaged again."),
)  # fmt: skip
def extract_teachers(**flags: Any) -> None:
    """Run frozen teachers once and store what they say.

    Running it again resumes. Another teacher or view can be added to a store at any time.
    """
    from pipeline.extract import ExtractConfig, extract
    from pipeline.inspection import closing_lines, inspect_store, summary_table

    flags["views"] = tuple(dict.fromkeys(flags["views"]))
    config = ExtractConfig(**flags)
    done = extract(config)
    if done.rank > 0:
        return  # of several processes, the first one tells
    summary = inspect_store(config.out, verify=False)
    print_rich(summary_table(summary), *closing_lines(summary))
    for repair in done.repaired:
        how = "the same bytes" if repair.same_bytes else "OTHER BYTES than before; noted in its provenance"
        click.echo(f"repaired {repair.array}, shard {repair.shard}: {how}")
    cost = ", ".join(f"{key} {seconds:.1f} s" for key, seconds in done.seconds_by_teacher.items())
    click.echo(f"{done.computed} targets computed in {done.seconds:.1f} s ({cost})")
    if done.computed:
        click.echo(done.times.line())
    sets = " ".join(f"--voc-set {name}" for name in config.voc_sets)
    sets += "" if config.limit is None else f" --limit {config.limit}"
    click.echo(f"next: python cli.py train --voc-root {config.voc_root} {sets} --cached-teachers {config.out}")


def grid_cell(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return a ROW,COLUMN option as numbers."""
    match = re.fullmatch(r"([0-9]{1,4}),([0-9]{1,4})", value or "")
    if value is not None and match is None:
        raise click.BadParameter(f"expected ROW,COLUMN, as 12,7, found {value!r}")
    return None if match is None else (int(match[1]), int(match[2]))


@click.command("inspect-cache", cls=Verb)
@options(
    click.argument("store", type=PATH),
    JSON,
    click.option("--verify", is_flag=True, help="Read every byte; compare checksums and digests."),
    click.option("--voc-root", type=PATH, help="Are these the images it was made from? With --sample: draw its image."),
    click.option("--voc-set", "voc_sets", multiple=True, help="Images to train on. [those it was made from]"),
    click.option("--sample", "samples", multiple=True, metavar="ID",
                 help="Draw this sample's features, as VOC2007/000005; repeat for several."),
    click.option("--heatmap", type=PATH, metavar="PNG", help="Where to."),
    click.option("--teacher", metavar="KEY", help="Whose features to draw. [the first that has some]"),
    click.option("--view", type=click.Choice(["original", "hflip"]), default="original", show_default=True,
                 help="View to draw."),
    click.option("--cell", callback=grid_cell, metavar="ROW,COLUMN",
                 help="Compare with this cell, counted from 0. [the largest object's centre, else the grid's]"),
)  # fmt: skip
def inspect_cache(
    store: Path, as_json: bool, verify: bool, voc_root: Path | None, voc_sets: tuple[str, ...],
    samples: tuple[str, ...], heatmap: Path | None, **drawn: Any,
) -> None:  # fmt: skip
    """Show what a store holds and whether it is whole.

    Exits 3 unless it is complete. What a training run would miss is told too.
    """
    from pipeline import inspection

    go_together = "--sample VOC2007/000005 --heatmap sample.png"
    if bool(samples) != (heatmap is not None):
        raise UsageError("--sample and --heatmap go together", hint=go_together)
    if (drawn["teacher"] or drawn["cell"]) and not samples:
        raise UsageError("--teacher and --cell are for --sample", hint=go_together)
    if voc_sets and voc_root is None:
        voc_root = Path("data/VOCdevkit")
    if heatmap is not None:
        heatmap.write_bytes(inspection.heatmap(store, samples, voc_root, **drawn))
        click.echo(f"wrote {heatmap}")
        return
    summary = inspection.inspect_with_progress(store, verify=verify, voc_root=voc_root, voc_sets=voc_sets)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        print_rich(inspection.summary_table(summary), *inspection.closing_lines(summary))
    click.get_current_context().exit(0 if summary["status"] == "complete" else 3)


@click.command("convert-cache", cls=Verb)
@options(
    click.argument("source", metavar="SRC", type=PATH),
    click.argument("out", metavar="DST", type=PATH),
    click.option("--dtype", type=click.Choice(["float16", "float32", "int8"]),
                 help="Stored dtype of features. [that of SRC]"),
    click.option("--pca", type=click.IntRange(1), metavar="R", help="Project features on R principal components."),
    click.option("--fit-set", "fit_sets", multiple=True, metavar="2007:train",
                 help="Images to fit them on. [all of SRC]"),
    VOC_ROOT,
    click.option("--teacher", "teachers", multiple=True, metavar="KEY", help="Teacher to take over. [all]"),
    click.option("--view", "views", multiple=True, type=click.Choice(["original", "hflip"]),
                 help="View to take over. [all]"),
    click.option("--format", type=click.Choice(["zarr", "hdf5"]),
                 help="Container of a new store. [hdf5 for .h5 and .hdf5, else zarr]"),
    click.option("--shard-samples", type=click.IntRange(1, 65536), help="Images a shard file holds. [as SRC]"),
    click.option("--repair", is_flag=True, help="Verify every byte of DST first; write what is damaged again."),
)  # fmt: skip
def convert_cache(**flags: Any) -> None:
    """Write a smaller store, DST, derived from SRC.

    Running it again resumes. Prints what was saved and how close the targets still are.
    """
    from pipeline.convert import ConvertConfig, conversion_lines, conversion_table, convert

    done = convert(ConvertConfig(**flags))
    print_rich(conversion_table(done), *conversion_lines(done))


@click.command("relabel-logits", cls=Verb)
@options(
    click.argument("store", type=PATH),
    click.option("--prompts", type=PATH, required=True, metavar="FILE", help="Templates and class names (YAML)."),
    click.option("--teacher", metavar="KEY", help="Whose embeddings to use, where several teachers have some."),
    click.option("--as", "key", metavar="KEY", help="Key of the new teacher. [the teacher's and the file's name]"),
    WEIGHTS,
    UNTRAINED,
    click.option("--logit-scale", type=float, help="Factor on the cosines. [the teacher's own]"),
    click.option("--voc-root", type=PATH,
                 help="Judge the logits by these annotations. [data/VOCdevkit, where it is there]"),
    click.option("--voc-set", "voc_sets", multiple=True, help="Images to judge them on. [those of the store]"),
    click.option("--repair", is_flag=True, help="Verify the new teacher's bytes first; write what is damaged again."),
)  # fmt: skip
def relabel_logits(**flags: Any) -> None:
    """Make new logits from other prompts.

    From stored embeddings: adds a teacher to the store in seconds; no image is looked at. Running it again resumes.
    """
    from pipeline.relabel import RelabelConfig, relabel, relabel_lines

    for line in relabel_lines(relabel(RelabelConfig(**flags))):
        click.echo(line)
