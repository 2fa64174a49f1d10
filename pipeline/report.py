"""`report`: one HTML file that compares finished runs, from their folders and the devkit. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import ReportError, UsageError
from data.images import decode_image
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.devkit_files import read_devkit
from evaluation.report.comparison import Comparison, compare
from evaluation.report.contents import report_page
from pipeline.progress import progress, say
from pipeline.run_folder import RunFolder, read_run_folder, run_of

_AGREE = 1e-6


@dataclass(frozen=True)
class ReportRequest:
    """What `report` was asked for; every field is one of its arguments."""

    runs: tuple[Path, ...]
    out: Path = Path("report.html")
    voc_root: Path | None = None
    baseline: str | None = None
    images: int = 24
    image_set: Literal["val", "test"] = "val"
    resamples: int = 1000


def write_report(request: ReportRequest) -> list[str]:
    """Write the report and return what to say of it, one line each.

    Raises UsageError or ReportError for runs that cannot be reported together, DatasetError, ImageError or
    DetectionsError for what else it reads.
    """
    if request.out.is_dir():
        raise UsageError(
            f"{request.out}: expected the file to write, found a folder", hint=f"--out {request.out / 'report.html'}"
        )
    folders = _read_folders(request)
    baseline = _baseline(request, folders)
    records = _records(request, folders)
    say(f"{len(folders)} run{'s' * (len(folders) != 1)}, {len(records)} images of {folders[0].sets(request.image_set)}")
    shown = _compare(request, folders, baseline, records)
    missing = _why_no_images(request, records)
    page = report_page(shown, None if missing else decode_image, request.images, missing)
    _write(request.out, page)
    size = f"{len(page.encode()) / 1e6:.1f} MB"
    pictures = "no pictures" if missing else f"{min(request.images, len(records))} pictures"
    lines = [f"wrote {request.out}: {len(folders)} run{'s' * (len(folders) != 1)}, {pictures}, {size}"]
    return lines + [missing] * bool(missing)


def _read_folders(request: ReportRequest) -> list[RunFolder]:
    if not request.runs:
        raise UsageError("no run was named", hint="give the folders of runs, as in: report runs/baseline runs/kd")
    resolved = [path.resolve() for path in request.runs]
    twice = [path for path in request.runs if resolved.count(path.resolve()) > 1]
    if twice:
        raise UsageError(f"{twice[0]}: this run is given twice")
    folders = [read_run_folder(path) for path in request.runs]
    if request.image_set == "test":
        untested = [folder for folder in folders if not folder.config["test_sets"]]
        if untested:
            raise UsageError(
                f"{untested[0].path}: --set test, but this run was trained without a test set",
                hint="report the validation images (--set val), or train with --test-set",
            )
    return folders


def _baseline(request: ReportRequest, folders: Sequence[RunFolder]) -> int:
    """Return the place of the run to compare with: the named one, the first that distilled nothing, or the first.

    Raises UsageError where the name is not among them, or of several.
    """
    if request.baseline is None:
        places = [place for place, folder in enumerate(folders) if folder.config["distillation"]["source"] == "none"]
        return places[0] if places else 0
    named = Path(request.baseline).resolve()
    places = [place for place, f in enumerate(folders) if f.path.resolve() == named or f.name == request.baseline]
    if len(places) != 1:
        names = ", ".join(str(folder.path) for folder in folders)
        what = "is none of the runs" if not places else f"is the name of {len(places)} runs"
        raise UsageError(f"--baseline {request.baseline} {what} ({names})", hint="name it by its folder, as the runs")
    return places[0]


def _records(request: ReportRequest, folders: Sequence[RunFolder]) -> list[ImageRecord]:
    """Return the images that all runs were scored on, in the order of the first one's sets.

    Raises ReportError where runs were scored on different images, or on different annotations of them.
    """
    first = folders[0]
    by_source: dict[tuple[Path, tuple[str, ...]], list[ImageRecord]] = {}
    for folder in folders:
        root = request.voc_root or Path(folder.config["voc_root"])
        sets = tuple(folder.config[f"{request.image_set}_sets"])
        if (root, sets) not in by_source:
            by_source[root, sets] = read_voc(root, sets)
        _refuse_other_images(first, folder, next(iter(by_source.values())), by_source[root, sets], request.image_set)
    records = next(iter(by_source.values()))
    scored = first.result["images"][request.image_set]
    if scored != len(records):
        raise ReportError(
            f"{first.path}: scored on {scored} images, but {first.sets(request.image_set)} has {len(records)} now",
            hint="point --voc-root at the devkit that the run was scored on",
        )
    return records


def _refuse_other_images(
    first: RunFolder, other: RunFolder, expected: list[ImageRecord], found: list[ImageRecord], image_set: str
) -> None:
    if expected is found:
        return
    ids, other_ids = ({record.id for record in records} for records in (expected, found))
    what = f"{first.path} on {first.sets(image_set)}, {other.path} on {other.sets(image_set)}"
    if ids != other_ids:
        only = sorted(ids ^ other_ids)[0]
        raise ReportError(
            f"the runs were scored on different images: {what}; {only} is in only one of the two",
            hint="report them apart, or score one of them on the other's images: python cli.py eval --help",
        )
    targets = {record.id: record.target for record in found}
    for record in expected:
        one, two = record.target, targets[record.id]
        same = all(
            (getattr(one, n).tolist() == getattr(two, n).tolist()) for n in ("boxes_xyxy_orig", "labels", "difficult")
        )
        if not same:
            raise ReportError(
                f"the runs were scored on different annotations of {record.id}: {what}",
                hint="if one devkit is right for all of them, name it: --voc-root",
            )


def _compare(
    request: ReportRequest, folders: Sequence[RunFolder], baseline: int, records: list[ImageRecord]
) -> Comparison:
    names = [folder.name for folder in folders]
    runs = []
    for folder in folders:
        say(f"reading {folder.path}")
        found, notes = read_devkit(folder.detections(request.image_set), records)
        for note in notes:
            say(f"{folder.path}: {note}")
        name = folder.name if names.count(folder.name) == 1 else str(folder.path)
        runs.append(run_of(folder, found, name, request.image_set))
    with progress("resampling images", request.resamples * (2 * len(runs) - 1), "resamples") as tick:
        shown = compare(runs, baseline, folders[0].sets(request.image_set), records, request.resamples, tick)
    for folder, analysis in zip(folders, shown.analyses, strict=True):
        _refuse_other_detections(folder, request.image_set, analysis.result.mAP)
    return shown


def _refuse_other_detections(folder: RunFolder, image_set: str, found: float | None) -> None:
    """Raise ReportError where the detections do not come to the figure in the run's result."""
    expected = folder.last(image_set)["mAP"]
    if abs((expected or 0.0) - (found or 0.0)) > _AGREE:
        raise ReportError(
            f"{folder.path / 'detections' / image_set}: these detections come to mAP {100 * (found or 0.0):.3f},"
            f" the run's result.json says {100 * (expected or 0.0):.3f}: they are of another epoch, or the annotations"
            " are others",
            hint=f"make them anew: {folder.save_detections(image_set)}",
        )


def _why_no_images(request: ReportRequest, records: Sequence[ImageRecord]) -> str:
    """Return why there will be no pictures, nothing where there will be."""
    if request.images == 0:
        return "No pictures were asked for (--images 0)."
    if any(record.image_path.is_file() for record in records):
        return ""
    return (
        f"No pictures: none of the image files is in {records[0].image_path.parent}. Point --voc-root at a devkit with"
        " its JPEGImages to have them; all figures need the annotations only."
    )


def _write(out: Path, page: str) -> None:
    """Write the page by renaming, so that an earlier report is replaced whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ReportError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
