"""What sets a sweep's arms apart: the settings that are not the same in all of them."""

from __future__ import annotations

from pipeline.results import NOT_MEASURED
from pipeline.sweep.setting_text import setting_name, setting_text
from pipeline.sweep.summary import SweepSummary


def varied_settings(summary: SweepSummary) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the names of these settings, and for every arm its name, its values and its finished seeds, as text."""
    names = list(dict.fromkeys(name for arm in summary.arms for name in arm.settings))
    varied = [name for name in names if len({setting_text(arm.settings.get(name)) for arm in summary.arms}) > 1]
    rows = [
        (
            arm.name,
            *(setting_text(arm.settings.get(name)) for name in varied),
            ", ".join(map(str, arm.finished)) or NOT_MEASURED,
        )
        for arm in summary.arms
    ]
    return [setting_name(name) for name in varied], rows
