"""Verbs that score detections and report runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from data.errors import UsageError
from pipeline.options import DEVICE, JSON, PATH, WORKERS, options
from pipeline.verbs.verb import Verb, print_rich


@click.command("eval", cls=Verb)
@options(
    click.option("--checkpoint", type=PATH, help="A student's checkpoint."),
    click.option("--detections", type=PATH, metavar="DIR|FILE.json",
                 help="Or: a folder of <prefix>_<class>.txt files, or COCO's results."),
    click.option("--compare", type=PATH, nargs=2, metavar="A B",
                 help="Or: two of these, or of runs' folders: B − A with intervals."),
    click.option("--detail", is_flag=True, help="Intervals, kinds of mistakes and what they cost, calibration."),
    click.option("--backbone", help="Insist on this backbone."),
    click.option("--voc-root", type=PATH, help="Folder that holds VOC2007. [the checkpoint's, or data/VOCdevkit]"),
    click.option("--voc-set", "voc_sets", multiple=True, help="Images to score. [the checkpoint's validation set]"),
    click.option("--metric", type=click.Choice(["voc", "voc07", "coco"]), default="voc", show_default=True,
                 help="All-point area or 11-point AP by the devkit's rules, or COCO's."),
    click.option("--save-detections", type=PATH, metavar="DIR|FILE.json",
                 help="Write them in the devkit's format or as COCO's results."),
    click.option("--visualize", type=click.IntRange(0), default=0, metavar="N", help="Draw N images."),
    click.option("--out", type=PATH, default="pictures", show_default=True, help="Folder of the pictures."),
    click.option("--agreement", "agreement_stores", type=PATH, multiple=True, metavar="STORE",
                 help="Also: how close the student is to its stored teachers on these images."),
    click.option("--feature-teacher", metavar="KEY", help="Whose features. [those it was distilled from]"),
    click.option("--logit-teacher", metavar="KEY", help="Whose logits. [those it was distilled from]"),
    WORKERS,
    DEVICE,
    JSON,
)  # fmt: skip
def evaluate_verb(
    checkpoint: Path | None,
    detections: Path | None,
    compare: tuple[Path, Path] | None,
    detail: bool,
    agreement_stores: tuple[Path, ...],
    feature_teacher: str | None,
    logit_teacher: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Score detections, or compare two sets of them.

    Of a checkpoint or from files, by the devkit's rules or COCO's. Scoring --detections needs the annotations only: no
    images, no torch.
    """
    from pipeline.agreement_options import open_agreement
    from pipeline.scoring import ScoreRequest, score

    if [checkpoint, detections, compare].count(None) != 2:
        raise UsageError("give one of --checkpoint, --detections and --compare")
    request = ScoreRequest(checkpoint=checkpoint, detections=detections, **flags)
    teachers = open_agreement(checkpoint, agreement_stores, feature_teacher, logit_teacher, flags)
    if compare is not None:
        if detail:
            raise UsageError("--detail goes with one detector: --checkpoint or --detections")
        _print_comparison(compare, request, as_json)
        return
    found = None
    if detail:
        from pipeline.detail import score_in_detail

        result, found, notes = score_in_detail(request)
    else:
        result, notes = score(request)
    agreement = None if teachers is None else teachers.measure()
    if teachers is not None:
        notes += teachers.draw(flags["out"], flags["visualize"])
    if as_json:
        added = {} if found is None else {"detail": found.to_json()}
        added |= {} if agreement is None else {"agreement": agreement.to_json()}
        click.echo(json.dumps(result.to_json() | added, indent=2))
    else:
        from evaluation.table import result_table

        parts = [part for part in (found, agreement) if part is not None]
        print_rich(result_table(result), *(table for part in parts for table in part.tables()))
    for note in notes:
        click.echo(note, err=as_json)


def _print_comparison(pair: tuple[Path, Path], request: Any, as_json: bool) -> None:
    from pipeline.comparison import compare

    comparison = compare(pair, request)
    if as_json:
        click.echo(json.dumps(comparison.to_json(), indent=2))
    else:
        print_rich(*comparison.tables())
    for note in comparison.notes:
        click.echo(note, err=as_json)


@click.command("report", cls=Verb)
@options(
    click.argument("runs", metavar="RUN…", nargs=-1, required=True, type=PATH),
    click.option("--out", type=PATH, default="report.html", show_default=True, help="The file to write."),
    click.option("--voc-root", type=PATH, help="Folder that holds VOC2007. [the runs' own]"),
    click.option("--baseline", metavar="RUN", help="Compare with this one. [the first without distillation]"),
    click.option("--images", type=click.IntRange(0), default=24, show_default=True, metavar="N",
                 help="Pictures, of the images that matter most; 0 for none."),
    click.option("--set", "image_set", type=click.Choice(["val", "test"]), default="val", show_default=True,
                 help="Report the validation or the test images."),
    click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True, metavar="N",
                 help="Behind each interval over images."),
)  # fmt: skip
def report_verb(**flags: Any) -> None:
    """Compare finished runs in one HTML file.

    RUN is a run's folder, as runs/baseline-s0. The file needs nothing beside it and can be mailed.
    """
    from pipeline.report import ReportRequest, write_report

    for line in write_report(ReportRequest(**flags)):
        click.echo(line)
