"""Shows what `inspect-cache` found: tables that read well at 80 columns, and in fewer lines where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.inspection_arrays import SHORT_DIGEST, Arrays
from pipeline.text_tables import Heading, plain_table, printable, readable_size, readable_time, titled

Summary = dict[str, Any]  # the JSON of `inspect-cache`
_MAX_PROBLEMS = 20
_MAX_OUTLIERS = 3
_COLOURS = {"complete": "green", "incomplete": "yellow", "corrupt": "red"}


def summary_table(summary: Summary) -> Group:
    """Return the summary as a person reads it."""
    parts: list[RenderableType] = [_headline(summary)]
    if summary["dataset"] is not None:
        parts.append(_facts(summary))
        if not _holds_images(summary):
            parts += [_teachers(summary), *_logit_maps(summary), *_derived(summary)]
        parts += [_extraction(summary)] if summary["cost"] is not None else []
        parts += [Arrays(summary["arrays"]), *map(Text, _notes(summary))]
    else:
        parts.append(Text("Its manifests cannot be trusted, so nothing else was read."))
    if summary["problems"]:
        parts.append(_problems(summary["problems"]))
    return Group(*parts)


def closing_lines(summary: Summary) -> list[str]:
    """Return what training would miss, and the next command: lines that must not be wrapped, to be copied."""
    lines = []
    if _holds_images(summary):
        lines += ["", "An image store: decoded images for the student, no teacher's targets."]
    by_hint: dict[str, list[dict[str, Any]]] = {}
    for gap in summary["training"]:
        by_hint.setdefault(gap["hint"], []).append(gap)
    if by_hint:
        lines += ["", "A training run would miss:"]
    for hint, gaps in by_hint.items():
        lines += [f"  {gap['teacher'] + ': ' if gap['teacher'] else ''}{gap['problem']}" for gap in gaps]
        lines.append(f"    → {hint}")
    if summary["status"] == "complete" and not by_hint and not _holds_images(summary):
        lines += ["", "A training run finds all that it reads: features, logits and both views."]
    if summary["next"] is not None:
        lines += ["", f"next: {summary['next']}"]
    return [printable(line) for line in lines]


def _holds_images(summary: Summary) -> bool:
    return bool(summary["holds"] == "images")


def _headline(summary: Summary) -> Text:
    status = (summary["status"], f"bold {_COLOURS[summary['status']]}")
    return Text.assemble(printable(summary["store"]), ": ", status)


def _facts(summary: Summary) -> Table:
    dataset, (height, width), arrays = summary["dataset"], summary["frame"], summary["arrays"]
    limit = f", first {dataset['limit']}" if dataset["limit"] is not None else ""
    stored, plain = (sum(array[key] for array in arrays) for key in ("bytes", "float32_bytes"))
    share = f", {stored / plain:.0%} of {readable_size(plain)} in float32" if plain else ""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("images", f"{dataset['samples']:,} of {printable(' + '.join(dataset['sets']))}{limit}")
    table.add_row("frame", f"{height}×{width} px")
    table.add_row("size", f"{readable_size(stored)} on disk{share}")
    table.add_row("checked", "every byte" if summary["verified"] else "sizes and indices; --verify reads every byte")
    table.add_row("fingerprint", f"{summary['fingerprint'][:SHORT_DIGEST]}, format version {summary['format_version']}")
    return table


def _teachers(summary: Summary) -> Group:
    """Return what each teacher is; below its key its spec, where that is another."""
    teachers = summary["teachers"]
    table = plain_table(*map(Heading, ("teacher", "library", "weights", "input", "layer")))
    for key, teacher in teachers.items():
        weights = Text(printable(teacher.get("weights_digest", ""))[:SHORT_DIGEST])
        if teacher["untrained"]:
            weights.append(" untrained" if weights else "untrained", style="bold yellow")
        spec, library, layer = (printable(teacher.get(name, "")) for name in ("spec", "library", "layer"))
        size = "×".join(map(printable, teacher.get("input_size", [])))
        table.add_row(key if spec in ("", key) else f"{key}\n= {spec}", library, weights, size, layer)
    return titled("Teachers", table)


def _logit_maps(summary: Summary) -> list[Text]:
    lines = []
    for key, teacher in summary["teachers"].items():
        if teacher["multilabel_map"] is not None:
            note = " (UNTRAINED: expect chance)" if teacher["untrained"] else ""
            found = f"{100 * teacher['multilabel_map']:.1f}"
            lines.append(Text(f"{key}: image-level multi-label mAP {found} on these images{note}"))
    return lines


def _derived(summary: Summary) -> list[Text]:
    lines = []
    owners = {array["fingerprint"]: array["path"].partition("/")[0] for array in summary["arrays"]}
    for key, teacher in summary["teachers"].items():
        arrays = [array for array in summary["arrays"] if array["path"].startswith(f"{key}/")]
        sources = dict.fromkeys(array["source"][:SHORT_DIGEST] for array in arrays if array["source"])
        here = {owners[array["source"]] for array in arrays if array["source"] in owners}
        if here:
            lines.append(f"{key}: logits made from the embeddings of {', '.join(sorted(here))}")
        elif sources:
            lines.append(f"{key}: made from the features with fingerprint {' and '.join(sources)}")
        if teacher["pca"] is not None:
            rows, channels = teacher["pca"]["shape"]
            held, images = teacher["pca"]["explained_variance"], teacher["pca"]["fit_samples"]
            lines.append(
                f"{key}: {rows - 1} principal components of {channels} channels, which hold {held:.1%} of the"
                f" variance of {images:,} images"
            )
    commands = dict.fromkeys(t["command"] for t in summary["teachers"].values() if t["command"] is not None)
    lines += [f"by: {command}" for command in commands]
    return [Text("\nDerived", style="bold"), *map(Text, lines)] if lines else []


def _extraction(summary: Summary) -> Group:
    costs = {key: teacher["cost"] for key, teacher in summary["teachers"].items() if teacher["cost"] is not None}
    total = summary["cost"]
    alike = all((cost["devices"], cost["hosts"]) == (total["devices"], total["hosts"]) for cost in costs.values())
    columns = [Heading("teacher"), *(Heading(name, right=True) for name in ("time", "outputs", "each", "batch"))]
    table = plain_table(*columns, *([] if alike else [Heading("on")]))
    for key, cost in [*costs.items(), *([("all", total)] if len(costs) > 1 else [])]:
        each = f"{1000 * cost['seconds'] / cost['outputs']:.1f} ms" if cost["outputs"] else "–"
        time = readable_time(cost["seconds"]) + (f" in {cost['runs']} runs" if cost["runs"] > 1 else "")
        cells = [key, time, f"{cost['outputs']:,}", each, ", ".join(map(str, cost["batch_sizes"]))]
        table.add_row(*cells, *([] if alike else [_on(cost)]))
    days = " to ".join(dict.fromkeys([total["first"][:10], total["last"][:10]]))
    held_up = f", held up by {' and '.join(total['bottlenecks'])}" if total["bottlenecks"] else ""
    return titled(f"Extraction on {_on(total)}, {days}{held_up}", table)


def _on(cost: dict[str, Any]) -> str:
    return ", ".join(map(printable, [*cost["devices"], *cost["hosts"]])) or "a machine that was not noted"


def _notes(summary: Summary) -> list[str]:
    measured = [array for array in summary["arrays"] if array["mean"] is not None]
    if not measured:
        return []
    least, most = (choose(a["statistics_samples"] for a in measured) for choose in (min, max))
    samples = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    notes = [
        f"mean, std, outliers: over {samples} of {summary['dataset']['samples']:,} samples. An outlier's root mean"
        " square lies more than six robust standard deviations from the median."
    ]
    for array in measured:
        if array["outliers"]:
            ids = ", ".join(map(printable, array["outlier_ids"][:_MAX_OUTLIERS]))
            more = ", …" if array["outliers"] > _MAX_OUTLIERS else ""
            notes.append(f"  {array['path']}: worst {ids}{more}")
    compared = [array["fidelity"]["samples"] for array in measured if array["fidelity"] is not None]
    if compared:
        notes.append(
            "cosine mean, p01: of what is read to the original features, mean and 1st percentile over all tokens of"
            f" {min(compared):,} samples."
        )
    return notes


def _problems(problems: Sequence[dict[str, Any]]) -> Group:
    numbers = (Heading("shard", right=True), Heading("sample", right=True))
    table = plain_table(Heading("array"), *numbers, Heading("problem"))
    for problem in problems[:_MAX_PROBLEMS]:
        cells = [Text("–" if value is None else printable(value)) for value in problem.values()]
        cells[-1].stylize("red")
        table.add_row(*cells)
    if len(problems) > _MAX_PROBLEMS:
        table.add_row("…", "", "", f"{len(problems) - _MAX_PROBLEMS} more; --json lists all")
    return titled("Problems", table)
