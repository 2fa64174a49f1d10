"""`inspect-cache`: what a store holds, as JSON, as a table, and one sample of it as a picture. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cache.catalog import read_catalog
from cache.reader import TeacherStore
from cache.summary import summarise, summarise_unreadable
from cache.verify import find_problems
from data.errors import StoreCorruptError, StoreIncompleteError, UsageError
from data.geometry import View
from data.images import decode_image, show_view, squash
from data.voc import read_record
from pipeline.progress import progress as show_progress

_MAX_PROBLEMS = 20


def inspect_store(store: Path, *, verify: bool, progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Return the JSON of `inspect-cache`.

    progress: told the bytes of every shard that was checked.

    Raises StoreMissingError or StoreStaleError (newer format); a corrupt store is a result, not an error.
    """
    try:
        catalog = read_catalog(store)
        problems = find_problems(catalog, verify=verify, progress=progress)
    except StoreCorruptError as error:
        return summarise_unreadable(store, error)
    return summarise(catalog, problems, verified=verify)


def inspect_with_progress(store: Path, *, verify: bool) -> dict[str, Any]:
    """Return the JSON of `inspect-cache`, showing the progress of a verification in megabytes."""
    if not verify:
        return inspect_store(store, verify=False)
    total = sum(array["bytes"] for array in inspect_store(store, verify=False)["arrays"])
    with show_progress("verifying", max(1, total // 1_000_000), "MB") as tick:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            tick(done // 1_000_000 - before // 1_000_000)

        return inspect_store(store, verify=True, progress=advance)


def summary_table(summary: dict[str, Any]) -> Group:
    """Return the summary as a person reads it, at 80 columns."""
    parts: list[Any] = [_headline(summary)]
    if summary["dataset"] is not None:
        parts += [_facts(summary), _teachers(summary), _arrays(summary)]
    if summary["problems"]:
        parts.append(_problems(summary["problems"]))
    return Group(*parts)


def heatmap(store: Path, sample_id: str, voc_root: Path | None, view: View = "original") -> bytes:
    """Return a PNG of one sample's stored features, with its image where the devkit is given.

    Raises UsageError for an unknown id, StoreIncompleteError where no teacher has features of it.
    """
    from evaluation.heatmaps import heatmap_figure

    opened = TeacherStore(store)
    if sample_id not in opened.row_of_id:
        known = list(opened.row_of_id)
        raise UsageError(f"no sample {sample_id!r} in {store}; it holds {known[0]} … {known[-1]} ({len(known)})")
    with_features = [
        key for key, t in opened.catalog.teachers.items() if view in t.views and "features" in t.views[view].layouts
    ]
    if not with_features:
        raise StoreIncompleteError(f"{store}: no teacher has features of view {view!r}")
    key = with_features[0]
    features = opened.array(key, view, "features").read(opened.row_of_id[sample_id])
    image: NDArray[np.uint8] | None = None
    if voc_root is not None:
        image = squash(show_view(decode_image(read_record(voc_root, sample_id)), view))
    untrained = opened.catalog.teachers[key].manifest.untrained
    title = f"{sample_id} · {key} · {view}"
    return heatmap_figure(np.asarray(features, dtype=np.float32), title, image=image, untrained=untrained)


def _headline(summary: dict[str, Any]) -> Text:
    colour = {"complete": "green", "incomplete": "yellow", "corrupt": "red"}[summary["status"]]
    checked = "every byte verified" if summary["verified"] else "sizes and indices checked; --verify reads every byte"
    return Text.assemble(str(summary["store"]), ": ", (summary["status"], f"bold {colour}"), f" ({checked})")


def _facts(summary: dict[str, Any]) -> Table:
    dataset, frame = summary["dataset"], summary["frame"]
    limit = f", first {dataset['limit']}" if dataset["limit"] is not None else ""
    total = sum(array["bytes"] for array in summary["arrays"])
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_row(
        "images", f"{dataset['samples']} of {' + '.join(dataset['sets'])}{limit}, frame {frame[0]}×{frame[1]}"
    )
    table.add_row("size", f"{_size(total)}, format version {summary['format_version']}")
    table.add_row("fingerprint", str(summary["fingerprint"])[:16])
    return table


def _teachers(summary: dict[str, Any]) -> Table:
    table = Table(title="Teachers", title_justify="left", box=None, padding=(0, 1))
    for column in ("teacher", "library", "weights", "input", "layer"):
        table.add_column(column, overflow="fold")
    for key, teacher in summary["teachers"].items():
        size = "×".join(str(n) for n in teacher.get("input_size", []))
        weights = Text(str(teacher.get("weights_digest", ""))[:12])
        if teacher["untrained"]:
            weights.append(" untrained", style="bold yellow")
        table.add_row(key, str(teacher.get("library", "")), weights, size, str(teacher.get("layer", "")))
    return table


def _arrays(summary: dict[str, Any]) -> Table:
    table = Table(title="Arrays", title_justify="left", box=None, padding=(0, 1))
    table.add_column("array", overflow="fold")
    table.add_column("shape")
    table.add_column("dtype")
    table.add_column("size", justify="right")
    table.add_column("committed", justify="right")
    for array in summary["arrays"]:
        shape = array["shape"]
        done = shape[0] - array["missing"]
        committed = Text("all", style="green") if array["complete"] else Text(f"{done}/{shape[0]}", style="yellow")
        table.add_row(array["path"], "×".join(map(str, shape)), array["dtype"], _size(array["bytes"]), committed)
    return table


def _problems(problems: list[dict[str, Any]]) -> Table:
    table = Table(title="Problems", title_justify="left", box=None, padding=(0, 1))
    for column in ("array", "shard", "sample", "problem"):
        table.add_column(column, overflow="fold", style="red" if column == "problem" else None)
    for problem in problems[:_MAX_PROBLEMS]:
        table.add_row(*("–" if problem[key] is None else str(problem[key]) for key in problem))
    if len(problems) > _MAX_PROBLEMS:
        table.add_row("…", "", "", f"{len(problems) - _MAX_PROBLEMS} more; --json lists all")
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
