"""Curves over epochs, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from markupsafe import Markup

from .bars import Bars, bar_chart
from .charts import Series, chart_grid, line_chart
from .comparison import Comparison
from .page import Section
from .run import Epoch, Run
from .tables import Cell, Column, table
from .text import percent, seconds

# In this order, what a run has of them; others follow by name.
_LOSSES = ("total", "detection", "feature", "logit", "region")
_EXPLAINED = {
    "total": "Objective, weighted sum", "detection": "Detection loss", "feature": "Feature loss, unweighted",
    "logit": "Logit loss, unweighted", "region": "Region loss, unweighted", "gradient_norm": "Gradient norm",
    "loss_objectness": "Proposals: objectness", "loss_rpn_box_reg": "Proposals: boxes",
    "loss_classifier": "Detections: classes", "loss_box_reg": "Detections: boxes",
}  # fmt: skip
_MOST_ROWS_SHOWN = 60


def curves_section(shown: Comparison) -> Section:
    """Return losses and validation AP by epoch."""
    runs = shown.runs
    figures = [
        ("Validation mAP, percent", _chart(runs, "validation mAP", lambda e: _percent(e.mean_ap))),
        ("Validation AP50, percent", _chart(runs, "validation AP50", lambda e: _percent(e.ap50))),
    ]
    found = {name for run in runs for epoch in run.history for name in epoch.losses}
    figures += [_loss(runs, name) for name in _LOSSES if name in found]
    parts = [_loss(runs, name) for name in sorted(found - set(_LOSSES), key=lambda n: (n not in _EXPLAINED, n))]
    body = chart_grid(figures, names=shown.names) + _numbers(runs)
    if parts:
        folded = "<details><summary>Parts of the detection loss, gradient norm</summary>{}</details>"
        body += Markup(folded).format(chart_grid(parts))
    return Section("curves", "Training curves", body, "Losses are means over the training images of each epoch.")


def time_section(shown: Comparison) -> Section:
    """Return what each run's training spent its time on."""
    columns = [Column("run", numeric=False), Column("device", numeric=False)]
    columns += [Column(label) for label in ("training", "median epoch", "per image", "waiting for images", "targets")]
    rows, waits = [], []
    for run in shown.runs:
        times = run.times
        epoch = median(times.epochs)
        wait, targets = (part / max(times.training, 1e-9) for part in (times.data_wait, times.targets))
        waits.append(100 * wait)
        rows.append([
            Cell(run.name), Cell(times.device), Cell(seconds(times.training), value=times.training),
            Cell(seconds(epoch), value=epoch), Cell(f"{1000 * epoch / max(times.images, 1):.0f} ms", value=epoch),
            Cell(f"{percent(wait)} %", value=wait), Cell(f"{percent(targets)} %", value=targets),
        ])  # fmt: skip
    per_image = [1000 * median(run.times.epochs) / max(run.times.images, 1) for run in shown.runs]
    bars = [
        Bars(run.name, [value], place) for place, (run, value) in enumerate(zip(shown.runs, per_image, strict=True))
    ]
    body = table(columns, rows, caption="Time of training, validation apart", styles=range(len(rows)))
    if len(rows) > 1:
        chart = bar_chart([""], bars, title="Milliseconds an image, a bar a run", text=lambda v: f"{v:.0f} ms")
        body += chart_grid([("Milliseconds an image, median epoch", chart)], names=shown.names)
    note = "Runs that shared a machine with other work, or each other, are not to be compared by these figures."
    return Section("time", "Time", body, note)


def _loss(runs: Sequence[Run], name: str) -> tuple[str, Markup]:
    caption = _EXPLAINED.get(name, name)
    return caption, _chart(runs, caption, lambda epoch: epoch.losses.get(name))


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _chart(runs: Sequence[Run], title: str, value: Callable[[Epoch], float | None]) -> Markup:
    series = []
    for place, run in enumerate(runs):
        points = [(epoch.number, value(epoch)) for epoch in run.history]
        known = [(number, y) for number, y in points if y is not None]
        series.append(Series(run.name, [x for x, _ in known], [y for _, y in known], place))
    last = max((run.num_epochs for run in runs), default=1)
    return line_chart(series, title=f"{title} by epoch", x_label="epoch", whole_x=True, x_range=(1, max(last, 2)))


def _numbers(runs: Sequence[Run]) -> Markup:
    """Return the validation curve as a table, folded: for who cannot see the charts, or wants the figures."""
    epochs = sorted({epoch.number for run in runs for epoch in run.history if epoch.mean_ap is not None})
    by_run: list[dict[int, Epoch]] = [{epoch.number: epoch for epoch in run.history} for run in runs]
    rows = [
        [str(number), *(percent(found[number].mean_ap if number in found else None, 2) for found in by_run)]
        for number in epochs[-_MOST_ROWS_SHOWN:]
    ]
    columns = [Column("epoch", numeric=False), *(Column(run.name) for run in runs)]
    shown = table(columns, rows, caption="Validation mAP by epoch, percent")
    return Markup("<details><summary>Validation mAP by epoch as a table</summary>{}</details>").format(shown)
