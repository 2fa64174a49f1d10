"""`convert-cache`: a derived store, with progress, and what it saves and loses as a table. Needs no torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.table import Table

from cache.convert import Conversion
from cache.convert import convert as convert_store
from cache.derive import ConvertRequest
from cache.fidelity import Fidelity
from cache.layout import CRC_BYTES
from cache.manifest import PcaManifest, StoredDtype
from cache.plan import StoreFormat
from cache.reader import TeacherStore
from data.errors import UsageError
from data.geometry import View
from data.voc import list_ids
from pipeline.progress import progress, say


@dataclass(frozen=True)
class ConvertConfig:
    """What `convert-cache` was asked for; every field is one of its arguments or options."""

    source: Path
    out: Path
    dtype: StoredDtype | None = None
    pca: int | None = None
    fit_sets: tuple[str, ...] = ()
    voc_root: Path = Path("data/VOCdevkit")
    teachers: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    format: StoreFormat | None = None
    shard_samples: int | None = None
    repair: bool = False

    def command(self) -> str:
        """Return the command that asks for the same again; it resumes, so `--repair` is not of it."""
        words = ["python", "cli.py", "convert-cache", str(self.source), str(self.out)]
        options = {"--dtype": self.dtype, "--pca": self.pca, "--format": self.format}
        words += [str(word) for name, value in options.items() if value is not None for word in (name, value)]
        if self.shard_samples is not None:
            words += ["--shard-samples", str(self.shard_samples)]
        if self.fit_sets:
            words += ["--voc-root", str(self.voc_root)]
        many = {"--fit-set": self.fit_sets, "--teacher": self.teachers, "--view": self.views}
        return shlex.join([*words, *(word for name, values in many.items() for v in values for word in (name, v))])


def convert(config: ConvertConfig) -> Conversion:
    """Make or resume the derived store that the configuration asks for, showing progress.

    Raises UsageError for a fit set without a PCA; DatasetError for an image set that is not there; else as
    `cache.convert.convert`.
    """
    if config.fit_sets and config.pca is None:
        raise UsageError("--fit-set says what a PCA is fitted on, and none was asked for", hint="add --pca R")
    request = ConvertRequest(
        source=config.source,
        out=config.out,
        command=config.command(),
        teachers=config.teachers,
        views=config.views,
        dtype=config.dtype,
        components=config.pca,
        fit_ids=_fit_ids(config),
        format=config.format,
        shard_samples=config.shard_samples,
        repair=config.repair,
    )
    done = convert_store(request, progress)
    if not done.written:
        say("the store is complete: nothing to do")
    return done


def _fit_ids(config: ConvertConfig) -> frozenset[str] | None:
    if not config.fit_sets:
        return None
    ids = frozenset(list_ids(config.voc_root, config.fit_sets))
    held = len(ids.intersection(TeacherStore(config.source).row_of_id))
    if 0 < held < len(ids):
        say(f"--fit-set: {held} of its {len(ids)} images are in {config.source}: the PCA is fitted on these")
    return ids


def conversion_table(done: Conversion) -> Table:
    """Return what the conversion saved and lost, by teacher and view, at 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("teacher", overflow="fold")
    table.add_column("view", no_wrap=True)
    for heading in ("before", "after", "saved", "cosine\nmean", "cosine\np01", "rel.\nerror", "expl.\nvar."):
        table.add_column(heading, justify="right", no_wrap=True)
    for view in done.views:
        table.add_row(view.teacher, view.view, *_bytes(view.bytes_before, view.bytes_after), *_figures(view.fidelity))
    for key, basis in done.bases.items():
        table.add_row(key, "basis", "–", _size(_basis_bytes(basis)))
    table.add_row("total", "", *_bytes(*_totals(done)), style="bold")
    return table


def conversion_lines(done: Conversion) -> list[str]:
    """Return what is to be said below the table: PCA, repairs, time, the next command."""
    lines = [
        f"{key}: {basis.shape[0] - 1} of {basis.shape[1]} components hold {basis.explained_variance:.2%} of the"
        f" variance of {basis.fit_samples} images"
        for key, basis in done.bases.items()
    ]
    for repair in done.repairs:
        how = "the same bytes" if repair.same_bytes else "OTHER BYTES than before; noted in its provenance"
        lines.append(f"repaired {repair.array}, shard {repair.shard}: {how}")
    measured = max((view.fidelity.samples for view in done.views if view.fidelity is not None), default=0)
    if measured:
        lines.append(f"fidelity: of what is read from {done.out} to what is read from {done.source}, {measured} images")
    before, after = _totals(done)
    lines.append(f"{done.written} targets converted in {done.seconds:.1f} s, {_size(before - after)} saved")
    sets = "".join(f" --voc-set {name}" for name in done.sets) + (f" --limit {done.limit}" if done.limit else "")
    lines.append(f"next: python cli.py train{sets} --cached-teachers {shlex.quote(str(done.out))}")
    return lines


def _totals(done: Conversion) -> tuple[int, int]:
    bases = sum(_basis_bytes(basis) for basis in done.bases.values())
    return sum(view.bytes_before for view in done.views), sum(view.bytes_after for view in done.views) + bases


def _basis_bytes(basis: PcaManifest) -> int:
    return 4 * prod(basis.shape) + CRC_BYTES


def _bytes(before: int, after: int) -> tuple[str, str, str]:
    return _size(before), _size(after), f"{1 - after / before:.1%}"


def _figures(fidelity: Fidelity | None) -> tuple[str, ...]:
    if fidelity is None:
        return ("–",) * 4
    shown = (
        (fidelity.cosine_mean, 5),
        (fidelity.cosine_p01, 5),
        (fidelity.relative_error, 4),
        (fidelity.explained_variance, 5),
    )
    return tuple("–" if value is None else f"{value:.{digits}f}" for value, digits in shown)


def _size(count: float) -> str:
    """Return a number of bytes in three or four digits; negative where a store grew."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
