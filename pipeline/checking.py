"""`check-voc`: runs the check with progress, and says what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.check import CheckReport, check_voc
from pipeline.progress import progress

_MAX_SHOWN = 100


def check_with_progress(voc_root: Path, sets: Sequence[str], *, decode: bool) -> CheckReport:
    """Return the report of `data.check.check_voc`, showing its progress."""
    from data.voc import list_ids

    with progress("checking", len(list_ids(voc_root, sets))) as tick:
        return check_voc(voc_root, sets, decode=decode, progress=lambda _done, _total: tick())


def report_lines(report: CheckReport) -> list[str]:
    """Return the report as lines: problems first, the verdict last."""
    order = {"error": 0, "warning": 1, "note": 2}
    problems = sorted(report.problems, key=lambda problem: order[problem.level])
    lines = [f"{p.level}: {p.what if str(p.file) in p.what else f'{p.file}: {p.what}'}" for p in problems[:_MAX_SHOWN]]
    if len(problems) > _MAX_SHOWN:
        lines.append(f"… and {len(problems) - _MAX_SHOWN} more")
    lines.append(
        f"{report.images} images ({report.images_without_objects} without objects), {report.objects} objects"
        f" ({report.difficult} difficult)"
    )
    counts = {level: sum(p.level == level for p in problems) for level in order}
    verdict = "sound" if report.ok else "not sound"
    lines.append(f"{verdict}: {counts['error']} errors, {counts['warning']} warnings, {counts['note']} notes")
    return lines
