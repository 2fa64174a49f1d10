"""Puts sections together as one HTML file that needs nothing beside it.

Styles, script, pictures and charts are inside. A content security policy in the file itself forbids every request, so
a report that someone was sent cannot call anywhere. The same sections give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import text

TEMPLATES = Path(__file__).parent / "templates"
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Section:
    """A part of a page. key: its anchor, unique on the page.  body: HTML.  note: a line under the title."""

    key: str
    title: str
    body: Markup
    note: str = ""


def build_page(
    title: str, sections: Sequence[Section], *, facts: Sequence[str] = (), caveats: Sequence[str] = ()
) -> str:
    """Return the HTML file of these sections, in their order.

    facts: what was compared, in the header.  caveats: what keeps the figures from meaning more, in plain sight there.

    Raises ValueError where two sections share a key.
    """
    keys = [section.key for section in sections]
    if len(set(keys)) != len(keys):
        raise ValueError(f"expected every section's key once, found {', '.join(keys)}")
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return str(
        render(
            "page.html",
            title=title,
            sections=sections,
            facts=facts,
            caveats=caveats,
            style=Markup(_asset("report.css")),
            script=Markup(script),
            script_digest=digest,
        )
    )


def render(template: str, *, folder: Path = TEMPLATES, **values: Any) -> Markup:
    """Return a template filled in; values are escaped unless they are markup.

    folder: where the template is; it may use those of the report beside its own.
    """
    return Markup(_environment(folder).get_template(template).render(**values))


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=text.percent, points=text.points, seconds=text.seconds, count=text.count, number=text.number
    )
    return environment


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
