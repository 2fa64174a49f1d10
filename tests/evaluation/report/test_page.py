"""The page around the sections: safe, self-contained, the same every time."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from evaluation.report.heat_map import heat_map
from evaluation.report.page import Section, build_page, render
from evaluation.report.tables import Cell, Column, table

HOSTILE = "<script>alert(1)</script>\"'&"


class Tags(HTMLParser):
    """Counts tags and keeps what is written outside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> str:
    rows = [[Cell(HOSTILE, note=HOSTILE, value=1, share=0.5), HOSTILE]]
    shown = table([Column(HOSTILE, title=HOSTILE, group=HOSTILE), Column("b")], rows, caption=HOSTILE, sortable=True)
    shown += heat_map([[0.5]], rows=[HOSTILE], columns=[HOSTILE], title=HOSTILE, row_label=HOSTILE,
                      column_label=HOSTILE, text=lambda _: HOSTILE, details=[[HOSTILE]])  # fmt: skip
    return build_page(HOSTILE, [Section("one", HOSTILE, shown, HOSTILE)], facts=[HOSTILE], caveats=[HOSTILE])


def test_nothing_that_is_given_as_text_becomes_markup():
    found = Tags(page())
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert found.text.count("<script>alert(1)</script>") >= 12
    assert {name for _, attributes in found.tags for name in attributes if name.startswith("on")} == set()


def test_the_policy_allows_the_one_script_and_no_request():
    text = page()
    policy = next(a["content"] for tag, a in Tags(text).tags if tag == "meta" and "http-equiv" in a) or ""
    script = text.split("<script>")[-1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
    ]  # fmt: skip


def test_nothing_leads_outside_the_file():
    text = page()
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text)
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text


def test_the_same_sections_give_the_same_bytes():
    assert page() == page()


def test_two_sections_with_one_key_are_refused():
    with pytest.raises(ValueError, match="every section's key once, found a, a"):
        build_page("t", [Section("a", "A", Markup("")), Section("a", "B", Markup(""))])


def test_a_template_of_another_folder_can_use_those_of_the_report(tmp_path: Path):
    (tmp_path / "mine.html").write_text("<p>{{ value|points }}</p>{% include 'no_gallery.html' %}", encoding="utf-8")
    assert render("mine.html", folder=tmp_path, value=-0.0123, reason="a < b") == (
        '<p>−1.2</p><p class="absent">a &lt; b</p>'
    )


def test_a_table_tells_its_rows_columns_and_groups():
    columns = [Column("run", numeric=False), Column("mAP", group="voc", style=1), Column("AP50", group="voc", style=1)]
    text = table(columns, [["a", Cell("1.0", value=1.0), "2.0"]], caption="c", sortable=True, footer=["mean", "1", "2"])
    tags = Tags(str(text)).tags
    assert [a.get("scope") for tag, a in tags if tag == "th"] == ["colgroup", "col", "col", "col", "row", "row"]
    assert next(a for tag, a in tags if a.get("scope") == "colgroup")["colspan"] == "2"
    assert [a["data-v"] for tag, a in tags if "data-v" in a] == ["1"]


class TestHeatMap:
    @staticmethod
    def cells(values: list[list[float | None]], **settings: object) -> list[tuple[str, float]]:
        rows, columns = [str(n) for n in range(len(values))], [str(n) for n in range(len(values[0]))]
        text = heat_map(values, rows=rows, columns=columns, title="t", row_label="r", column_label="c",
                        text=lambda value: f"{value:g}", **settings)  # type: ignore[arg-type]  # fmt: skip
        found = re.findall(r'<td class="([a-z ]+)" style="--v:([0-9.]+)"', text)
        return [(kind, float(depth)) for kind, depth in found]

    def test_the_lowest_is_pale_and_the_highest_deep(self) -> None:
        assert self.cells([[1, 2], [4, 5]]) == [("lo", 0), ("lo", 0.25), ("mid", 0.75), ("hi", 1)]

    def test_diverging_shades_go_by_size_and_sign(self) -> None:
        found = self.cells([[-2, 1], [0, 4]], diverging=True)
        assert found == [("lo below", 0.5), ("lo", 0.25), ("lo", 0), ("hi", 1)]

    def test_an_empty_cell_has_no_shade(self) -> None:
        assert self.cells([[None, float("nan")], [1, 2]])[:2] == [("lo", 0), ("lo", 0)]

    def test_equal_values_share_a_shade(self) -> None:
        assert self.cells([[3, 3]]) == [("lo", 0.5), ("lo", 0.5)]
