"""The report in headless Chromium: no error, no request, filters, keyboard, widths, both colour schemes.

One browser and one page for all of it; skipped where Chromium or Playwright is not there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import ReportRequest, write_report
from tests.pipeline.made_runs import CACHED, make_run

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
# The boxes that a figure should show, from the marks themselves; the page's own script has no part in it.
VISIBLE_BOXES = """([run, kinds, name, score]) => [...document.querySelectorAll(".mark-box")].filter((mark) => {
  const kind = Number(mark.dataset.k), value = Number(mark.dataset.s);
  const there = kind === 8 || (kind === 6 ? value < score : value >= score);
  const figure = mark.closest("figure").dataset.run;
  return there && kinds.includes(kind) && (!name || mark.dataset.c === name) && (run === "all" || figure === run);
}).length"""
DRAWN_BOXES = """() => [...document.querySelectorAll("#gallery .mark-box")].filter(
  (mark) => mark.checkVisibility() && mark.getBoundingClientRect().width > 0).length"""
# The contrast of every piece of text with what is painted behind it, as WCAG 2 defines it; those below the bound.
LOW_CONTRAST = """(bound) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest(".mark-box, option, title")) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color);
    const [one, other] = [luminance(ink), luminance(behind(element))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    if (contrast < bound) low.push(`${contrast.toFixed(2)} ${node.data.trim().slice(0, 30)}`);
  }
  return low;
}"""


@dataclass
class Opened:
    """The open page, and what it complained of or asked for."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def shown(self) -> str:
        """What the page says that it shows."""
        return str(self.page.locator("#shown").inner_text())

    def expected_boxes(self, *, run: str = "all", kinds: Any = range(9), name: str = "", score: float = 0.3) -> int:
        return int(self.page.evaluate(VISIBLE_BOXES, [run, list(kinds), name, score]))


@pytest.fixture(scope="module")
def opened(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    folder = tmp_path_factory.mktemp("report")
    runs = (make_run(devkit, folder, "baseline", skill=0.3),
            make_run(devkit, folder, "cached-kd-with-a-rather-long-name", skill=0.7, distillation=CACHED))  # fmt: skip
    out = folder / "report.html"
    write_report(ReportRequest(runs, out, resamples=20))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        found = Opened(page)
        page.on("console", lambda message: found.messages.append(message.text))
        page.on("pageerror", lambda error: found.messages.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(out.as_uri())
        yield found
        browser.close()


@pytest.fixture
def fresh(opened: Opened) -> Opened:
    """The page as it is when it is opened."""
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(color_scheme="light")
    opened.page.reload()
    return opened


def test_it_complains_of_nothing_and_asks_for_nothing(fresh: Opened) -> None:
    assert fresh.messages == []
    assert {url.partition(":")[0] for url in fresh.requests} <= {"file", "data"}
    assert len({url for url in fresh.requests if url.startswith("file")}) == 1


def test_what_is_counted_is_what_is_drawn(fresh: Opened) -> None:
    expected = fresh.expected_boxes()
    assert expected > 10
    assert fresh.page.evaluate(DRAWN_BOXES) == expected
    assert fresh.shown() == f"6 of 6 images, {expected} boxes, score at least 0.30"


def test_filters_by_run_class_kind_and_score(fresh: Opened) -> None:
    page = fresh.page
    for run in ("0", "1"):
        page.get_by_label("Run", exact=True).select_option(run)
        assert fresh.page.evaluate(DRAWN_BOXES) == fresh.expected_boxes(run=run)
    assert fresh.expected_boxes(run="0") != fresh.expected_boxes(run="1")
    page.get_by_label("Run", exact=True).select_option("all")

    name = page.locator("#filter-class option").nth(1).inner_text()
    page.get_by_label("Class", exact=True).select_option(name)
    expected = fresh.expected_boxes(run="all", name=name)
    assert fresh.page.evaluate(DRAWN_BOXES) == expected > 0
    assert f" {expected} box" in fresh.shown()
    cards = page.locator("#gallery .card:visible").count()
    assert fresh.shown().startswith(f"{cards} of 6 images")
    assert 0 < cards < 6

    page.get_by_role("button", name="Show everything").click()
    page.get_by_role("button", name="Errors only").click()
    errors = fresh.expected_boxes(kinds=range(1, 7))
    page.wait_for_function(
        "(text) => document.getElementById('shown').textContent.includes(text)", arg=f" {errors} box"
    )
    assert fresh.page.evaluate(DRAWN_BOXES) == errors

    page.get_by_role("button", name="Show everything").click()
    page.get_by_label(re.compile("Score at least")).fill("0.8")
    assert fresh.page.evaluate(DRAWN_BOXES) == fresh.expected_boxes(score=0.8)
    assert fresh.shown().endswith("score at least 0.80")


def test_the_captions_count_what_is_drawn_by_kind(fresh: Opened) -> None:
    figure = fresh.page.locator("#gallery figure:visible").first
    told = figure.locator(".told").inner_text()
    drawn = figure.locator(".mark-box:not(.off)").count()
    assert sum(int(number) for number in re.findall(r"\d+", told)) == drawn


def test_filters_work_from_the_keyboard_alone(fresh: Opened) -> None:
    page = fresh.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"

    page.locator("#filter-run").focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate(DRAWN_BOXES) == fresh.expected_boxes(run="1")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
        if reached[-1] == "filter-score":
            page.keyboard.press("ArrowRight")
            assert fresh.shown().endswith("score at least 0.35")
        if reached[-1] == "6":
            page.keyboard.press("Space")
    kinds = [kind for kind in range(9) if kind != 6]
    assert page.evaluate(DRAWN_BOXES) == fresh.expected_boxes(run="1", kinds=kinds, score=0.35)
    assert reached[:3] == ["filter-class", "filter-score", "filter-labels"]
    assert reached[3:12] == [str(kind) for kind in range(9)]


def test_everything_that_can_be_used_has_a_name(fresh: Opened) -> None:
    unnamed = fresh.page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, a, [tabindex='0'], svg[role=img]")].filter((e) =>
            !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert fresh.page.locator("#shown").get_attribute("aria-live") == "polite"
    headings = fresh.page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_tables_sort_down_up_and_back(fresh: Opened) -> None:
    table = fresh.page.get_by_role("region", name=re.compile("^AP by class"))
    button = table.get_by_role("button", name="objects")

    def column() -> list[int]:
        return [int(text) for text in table.locator("tbody tr > td:nth-child(2)").all_inner_texts()]

    before = column()
    button.click()
    assert column() == sorted(before, reverse=True)
    assert table.locator("[aria-sort=descending]").inner_text().strip() == "objects"
    button.click()
    assert column() == sorted(before)
    button.click()
    assert column() == before


@pytest.mark.parametrize("width", [360, 768, 1440, 2560])
def test_no_width_scrolls_sideways(fresh: Opened, width: int) -> None:
    fresh.page.set_viewport_size({"width": width, "height": 900})
    fresh.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    fresh.page.locator("#filter-run").select_option("all")
    assert fresh.page.evaluate("document.documentElement.scrollWidth") == width
    assert fresh.page.evaluate("document.body.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_told_from_its_background(fresh: Opened, scheme: str) -> None:
    fresh.page.emulate_media(color_scheme=scheme)
    fresh.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert fresh.page.evaluate(LOW_CONTRAST, 4.5) == []
    page_is_dark = fresh.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert page_is_dark == (scheme == "dark")


def test_the_colours_can_be_chosen_against_the_system(fresh: Opened) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    button = fresh.page.locator("#theme")
    light = fresh.page.evaluate(background)
    button.click()
    button.click()
    assert button.inner_text() == "Colours: dark"
    assert fresh.page.evaluate(background) != light
    button.click()
    assert button.inner_text() == "Colours: as the system"
    assert fresh.page.evaluate(background) == light


def test_without_script_the_first_run_is_there_to_read(fresh: Opened) -> None:
    context = fresh.page.context.browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(fresh.page.url)
    assert plain.locator("#gallery figure").first.is_visible()
    assert not plain.locator("#filter-run").is_visible()
    assert plain.get_by_text("background", exact=True).first.is_visible()  # the legend
    context.close()
