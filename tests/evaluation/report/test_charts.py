"""What is drawn is where it should be: coordinates are read back from the markup by an XML parser."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from evaluation.report.bars import Bars, IntervalRow, bar_chart, interval_chart
from evaluation.report.charts import Series, legend, line_chart
from evaluation.report.reliability import reliability_diagram


def parsed(markup: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def points(path: str) -> list[tuple[float, float]]:
    pairs = (pair.split() for pair in path.lstrip("M").replace("M", "L").rstrip("z").split("L"))
    return [(float(x), float(y)) for x, y in pairs]


def lines(chart: ElementTree.Element) -> list[str]:
    return [each.attrib["d"] for each in chart.iter("path") if each.attrib["class"] == "line"]


class TestLines:
    def test_a_line_goes_through_its_points_on_the_axes_of_the_labels(self) -> None:
        chart = parsed(line_chart([Series("a", [0, 1], [0, 10])], title="t", x_range=(0, 1), y_range=(0, 10)))
        (start, end), (grid, *_, top) = (
            points(lines(chart)[0]),
            [e for e in chart.iter("path") if e.get("class") == "grid"],
        )
        assert float(grid.attrib["d"].split()[1].split("H")[0]) == start[1]  # zero is on the lowest line of the grid
        assert float(top.attrib["d"].split()[1].split("H")[0]) == end[1]
        labels = {e.text: float(e.attrib["x"]) for e in chart.iter("text") if e.get("text-anchor") == "middle"}
        assert labels["0.0"] == start[0]
        assert labels["1.0"] == end[0]

    def test_what_is_missing_leaves_a_gap(self) -> None:
        chart = parsed(line_chart([Series("a", [1, 2, 3, 4, 5], [1, 2, None, 4, 5])], title="t"))
        assert lines(chart)[0].count("M") == 2

    def test_a_band_encloses_its_line(self) -> None:
        series = Series("a", [0, 1, 2], [5, 6, 7], low=[4, 5, 6], high=[6, 8, 9])
        chart = parsed(line_chart([series], title="t"))
        band = points(next(e.attrib["d"] for e in chart.iter("path") if e.attrib["class"].startswith("band")))
        line = points(lines(chart)[0])
        upper, lower = band[:3], band[3:][::-1]
        for (x, y), (upper_x, upper_y), (lower_x, lower_y) in zip(line, upper, lower, strict=True):
            assert x == upper_x == lower_x
            assert upper_y < y < lower_y  # upwards is less

    def test_eighty_lines_repeat_a_colour_only_with_another_dash(self) -> None:
        drawn = parsed(legend([f"run {n}" for n in range(64)]))
        looks = set()
        for swatch in drawn.iter("svg"):
            line = next(e for e in swatch.iter("path") if e.get("class") == "line")
            looks.add((swatch.attrib["class"], line.get("stroke-dasharray")))
        assert len(looks) == 64

    def test_an_empty_chart_is_still_a_chart(self) -> None:
        assert parsed(line_chart([], title="nothing")).attrib["aria-label"] == "nothing"

    def test_names_are_escaped(self) -> None:
        chart = line_chart([Series("<b>&", [0], [1])], title='"><script>')
        assert "<b>" not in chart
        assert "<script>" not in chart
        assert parsed(chart).attrib["aria-label"] == '"><script>'


class TestBars:
    def test_bars_are_as_long_as_their_values(self) -> None:
        bars = [Bars("a", [10, 20, None]), Bars("b", [5, -10, 0], 1)]
        chart = parsed(bar_chart(["x", "y", "z"], bars, title="t", text=lambda v: f"{v:.0f}"))
        widths = {
            group.findtext("title"): float(group.find("rect").attrib["width"])  # type: ignore[union-attr]
            for group in chart.iter("g")
        }
        assert set(widths) == {"a, x: 10", "a, y: 20", "b, x: 5", "b, y: -10", "b, z: 0"}
        assert widths["a, y: 20"] == pytest.approx(2 * widths["a, x: 10"], abs=0.2)
        assert widths["b, y: -10"] == pytest.approx(widths["a, x: 10"], abs=0.2)
        zero = {float(g.find("rect").attrib["x"]) for g in chart.iter("g") if g.findtext("title") == "a, x: 10"}  # type: ignore[union-attr]
        left = next(g.find("rect") for g in chart.iter("g") if g.findtext("title") == "b, y: -10")
        assert left is not None
        assert float(left.attrib["x"]) + float(left.attrib["width"]) == pytest.approx(zero.pop(), abs=0.2)

    def test_an_interval_lies_around_its_estimate_and_zero_stays_in_view(self) -> None:
        chart = parsed(interval_chart([IntervalRow("a", 3.0, 1.0, 5.0)], title="t", x_label="Δ"))
        line = next(e.attrib["d"] for e in chart.iter("path") if e.attrib["class"] == "line")
        low, high = float(line[1:].split()[0]), float(line.split("H")[1].split("M")[0])
        middle = float(next(chart.iter("circle")).attrib["cx"])
        zero = float(next(e for e in chart.iter("path") if e.attrib["class"] == "axis").attrib["d"][1:].split()[0])
        assert zero < low < middle < high
        assert middle - low == pytest.approx(high - middle, abs=0.2)
        assert low - zero == pytest.approx((high - low) / 4, abs=0.2)


def test_a_calibrated_bin_ends_on_the_diagonal():
    chart = parsed(reliability_diagram([0, 0.5, 1], [0.25, None], [8, 0], title="t"))
    (bar,) = (e for e in chart.iter("rect") if e.attrib["class"] == "bar")
    assert bar.findtext("title") == "confidence 0.00 to 0.50: 25% of 8 right"
    (x0, y0), (x1, y1) = points(next(e.attrib["d"] for e in chart.iter("path") if e.attrib["class"] == "reference"))
    middle = float(bar.attrib["x"]) + float(bar.attrib["width"]) / 2
    on_diagonal = y0 + (middle - x0) / (x1 - x0) * (y1 - y0)
    assert float(bar.attrib["y"]) == pytest.approx(on_diagonal, abs=0.2)
