"""How close a student is to its teacher: the figures, as JSON, and as tables of 80 columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data.records import VOC_CLASSES

from .agreement import RegionCosine
from .logit_agreement import LogitAgreement


@dataclass(frozen=True)
class FeatureAgreement:
    """Agreement of maps. tap: of the student's map, `backbone` or `neck`.

    cosine: by region, None for one without a cell; None at all without an adapter, and then why_no_cosine says why.
    cka: linear CKA; cka_shuffled: against another image's teacher.  note: what is to be known of the cosines, or empty.
    """

    teacher: str
    tap: str
    feature_loss: str | None
    cosine: dict[str, RegionCosine | None] | None
    why_no_cosine: str | None
    cka: float | None
    cka_shuffled: float | None
    note: str = ""


@dataclass(frozen=True)
class Agreement:
    """A student beside its teachers, on a set of images, view `original`.

    trained_on: how many of the images the student was trained on; None where that cannot be told.  features, logits:
    None where they were not compared, and why_no_features, why_no_logits say why.  logit_note: as `note` of features.
    stores: what was read, as checkpoints keep it.
    """

    images: int
    trained_on: int | None
    stores: list[dict[str, Any]]
    untrained: list[str]
    features: FeatureAgreement | None
    why_no_features: str | None
    logit_teacher: str | None
    logits: LogitAgreement | None
    why_no_logits: str | None
    logit_note: str = ""

    @property
    def held_out(self) -> bool | None:
        """Whether the student was trained on none of the images; None where that cannot be told."""
        return None if self.trained_on is None else self.trained_on == 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, and `held_out`."""
        return {**asdict(self), "held_out": self.held_out}

    def tables(self) -> list[RenderableType]:
        """Return what a person reads: how the maps agree by region, how the logits do, then each class that occurs."""
        return [_tables(self)]


def _tables(agreement: Agreement) -> Group:
    images = f"{agreement.images:,} image{'' if agreement.images == 1 else 's'}"
    parts: list[RenderableType] = ["", Text(f"Agreement with the teachers, {images}: {_held_out(agreement)}", "bold")]
    if agreement.untrained:
        parts.append(Text(f"UNTRAINED teachers: {', '.join(agreement.untrained)}"))
    features, logits = agreement.features, agreement.logits
    if agreement.why_no_features is not None:
        parts.append(Text(f"features: not compared, {agreement.why_no_features}"))
    if features is not None:
        parts += _features(features)
    if agreement.why_no_logits is not None:
        parts.append(Text(f"logits: not compared, {agreement.why_no_logits}"))
    if logits is not None:
        parts += _logits(agreement, logits)
    if (features is not None and features.cosine is not None) or (logits is not None and logits.per_class is not None):
        parts.append(_by_class(features, logits))
    return Group(*parts)


def _held_out(agreement: Agreement) -> str:
    if agreement.trained_on is None:
        return "whether held out is not known"
    if agreement.trained_on == 0:
        return "held out"
    if agreement.trained_on == agreement.images:
        return "NOT held out, it was trained on them"
    return f"NOT held out, it was trained on {agreement.trained_on:,} of them"


def _features(features: FeatureAgreement) -> list[RenderableType]:
    table = _table(f"features of {features.teacher}", "cells", "mean", "1st pct", "median", "shuffled")
    if features.cosine is not None:
        for region in ("all", "objects", "background"):
            found = features.cosine[region]
            cells = (
                []
                if found is None
                else [f"{found.cells:,}", *map(_number, (found.mean, found.p1, found.p50, found.shuffled))]
            )
            table.add_row(f"cosine, {region if region != 'all' else 'all cells'}", *(cells or ["–"] * 5))
    table.add_row("linear CKA", "", _number(features.cka), "", "", _number(features.cka_shuffled))
    parts: list[RenderableType] = [table]
    if features.why_no_cosine is not None:
        parts.append(Text(f"no cosine: {features.why_no_cosine}"))
    elif features.note:
        parts.append(Text(f"{features.note}: compare cosines of runs with that loss only"))
    return parts


def _logits(agreement: Agreement, logits: LogitAgreement) -> list[RenderableType]:
    table = _table(f"logits of {agreement.logit_teacher}", "agreement", "shuffled")
    name = "KL" if logits.divergence == "kl" else "binary KL"
    if logits.kl is not None:
        table.add_row(
            f"{name} at T = {logits.temperature:g} (0 is equal)", _number(logits.kl), _number(logits.kl_shuffled)
        )
    table.add_row("same highest class", _percent(logits.top1), _percent(logits.top1_shuffled))
    table.add_row("multi-label mAP of the student's logits", _percent(logits.student_map), "")
    table.add_row("multi-label mAP of the teacher's logits", _percent(logits.teacher_map), "")
    return [table, *([Text(agreement.logit_note)] if agreement.logit_note else [])]


def _by_class(features: FeatureAgreement | None, logits: LogitAgreement | None) -> Table:
    """Return the classes that occur, in two halves side by side."""
    rows = []
    for name in VOC_CLASSES:
        cosine = None if features is None or features.cosine is None else features.cosine[name]
        kl = None if logits is None or logits.per_class is None else logits.per_class[name]
        if cosine is not None or kl is not None:
            rows.append((name, _number(None if cosine is None else cosine.mean), _number(kl)))
    table = _table("class", "cosine", "KL", "", "class", "cosine", "KL")
    half = (len(rows) + 1) // 2
    for left, right in zip(rows[:half], [*rows[half:], ("", "", "")], strict=False):
        table.add_row(*left, "", *right)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, column in enumerate(columns):
        left = number == 0 or column == "class"
        table.add_column(column, justify="left" if left else "right", no_wrap=True, min_width=0 if left else 8)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
