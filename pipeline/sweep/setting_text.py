"""How settings and their values are written for a reader."""

from __future__ import annotations

from typing import Any

_GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ"}


def setting_name(name: str) -> str:
    """Return a setting's name as its option has it, the weights of the losses as their letter."""
    return _GREEK.get(name, name.replace("_", "-"))


def setting_text(value: Any) -> str:
    """Return a setting's value as a reader writes it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
