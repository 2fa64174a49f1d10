"""What the runs were trained with: first what tells them apart, then everything; then teachers and stores."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from .comparison import Comparison
from .page import Section, render
from .run import Run
from .tables import Cell, Column, table
from .text import NOTHING

# What is told of a single run, which differs from nothing.
_CHIEF = ("student.backbone", "student.backbone_weights", "voc_sets", "limit", "val_sets", "recipe.epochs",
          "recipe.batch_size", "recipe.optimizer", "recipe.learning_rate", "recipe.flip", "seed")  # fmt: skip
_NAMES_OF_ITS_OWN = ("run_name",)


def settings_section(shown: Comparison) -> Section:
    """Return configuration, teachers and stores."""
    runs = shown.runs
    names = list(dict.fromkeys(name for run in runs for name in run.config if name not in _NAMES_OF_ITS_OWN))
    differing = [name for name in names if len({run.config.get(name) for run in runs}) > 1]
    if len(runs) > 1:
        chief, caption = differing, "Where the runs differ"
    else:
        chief, caption = [name for name in _CHIEF if name in names], "The chief settings"
    same = [name for name in names if name not in chief]
    body = render(
        "settings.html",
        differing=_settings_table(runs, chief, caption) if chief else None,
        same=_settings_table(runs[:1] if len(runs) > 1 else runs, same, "Settings" if len(runs) == 1 else "Shared"),
        count=len(same),
        alone=len(runs) == 1,
        teachers=_teachers(runs),
        stores=_stores(runs),
    )
    return Section("settings", "Configuration and teachers", body)


def _settings_table(runs: Sequence[Run], names: Sequence[str], caption: str) -> Markup:
    shared = caption == "Shared"
    heads = [Column("all runs", numeric=False)] if shared else [Column(run.name, numeric=False) for run in runs]
    rows = [[name, *(run.config.get(name, NOTHING) for run in runs)] for name in names]
    return table([Column("setting", numeric=False), *heads], rows, caption=caption)


def _teachers(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Return every teacher once, with the runs that distil it."""
    told: dict[tuple[object, ...], dict[str, object]] = {}
    used_by: dict[tuple[object, ...], list[str]] = {}
    for run in runs:
        for teacher in run.teachers:
            key = (teacher.key, teacher.untrained, tuple(teacher.identity.items()))
            used_by.setdefault(key, []).append(f"{run.name} ({', '.join(teacher.roles)})")
            columns = [Column("setting", numeric=False), Column(teacher.key, numeric=False)]
            told[key] = {
                "key": teacher.key,
                "untrained": teacher.untrained,
                "identity": table(columns, [list(item) for item in teacher.identity.items()], caption="Identity"),
            }
    return [{**entry, "runs": ", ".join(used_by[key])} for key, entry in told.items()]


def _stores(runs: Sequence[Run]) -> Markup | None:
    rows = []
    for run in runs:
        for store in run.stores:
            arrays = "; ".join(f"{path} {shape} {dtype}" for path, shape, dtype in store.arrays)
            rows.append([Cell(run.name), Cell(store.path), Cell(store.fingerprint), Cell(arrays)])
    columns = [Column(label, numeric=False) for label in ("run", "store", "fingerprint", "arrays read")]
    return table(columns, rows, caption="Stores") if rows else None
