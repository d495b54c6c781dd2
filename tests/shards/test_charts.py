"""Charts as they are parsed from the page: places, colours and text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from shards import charts


def places(drawing: str) -> list[list[tuple[float, float]]]:
    """Returns the points of each curve, in pixels."""
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]
        for line in re.findall(r'<polyline points="([^"]*)"', drawing)
    ]


def test_a_logarithmic_axis_gives_each_decade_the_same_height() -> None:
    line = [(1.0, 1.0), (2.0, 10.0), (3.0, 100.0), (4.0, 1000.0)]
    ((first, second, third, last),) = places(charts.curves("loss", [("a", line)], log=True))
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.2)
    assert third[1] - last[1] == pytest.approx(second[1] - third[1], abs=0.2)
    assert (first[0], last[0]) == (charts.LEFT, charts.CURVES_WIDTH - 8)
    drawing = charts.curves("loss", [("a", line)], log=True)
    assert [text for text in ("1", "10", "100", "1,000") if f">{text}</text>" in drawing] == [
        "1", "10", "100", "1,000",
    ]  # fmt: skip
    linear = charts.curves("loss", [("a", line)])
    assert linear != drawing
    below = [("a", [*line, (5.0, 0.0)])]  # has no logarithm
    assert charts.curves("loss", below, log=True) == charts.curves("loss", below)


def test_a_logarithmic_horizontal_axis_and_where_two_curves_are_at_one_height() -> None:
    line = [(1.0, 1.0), (10.0, 2.0), (100.0, 3.0)]
    width = charts.CURVES_WIDTH - 8 - charts.LEFT
    other = {"value": 10.0, "low": 0.1, "high": 31.622777}  # beyond the axis, and three quarters
    meeting = charts.Meeting(2.0, (0, 100.0), (1, other))
    drawing = charts.curves("s", [("a", line)], log_x=True, meetings=[meeting])
    assert [x for x, _ in places(drawing)[0]] == [charts.LEFT + width * k / 2 for k in range(3)]
    (whisker,) = re.findall(r'class="whisker" d="([^"]*)"', drawing)
    y = f"{8 + (charts.CURVES_HEIGHT - charts.BOTTOM - 8) / 2:.1f}"
    end = charts.LEFT + width * 3 / 4
    assert whisker.startswith(f"M{charts.LEFT:.1f} {y}H{end:.1f}M{end:.1f} ")
    assert whisker.count("v8") == 1  # no bar at the open end
    assert re.findall(r'cx="([\d.]+)"', drawing) == [
        f"{charts.LEFT + width:.1f}",
        f"{charts.LEFT + width / 2:.1f}",
    ]
    straight = charts.curves(
        "s", [("a", [(0.0, 1.0), (4.0, 2.0)])], log_x=True
    )  # 0 has no logarithm
    assert straight == charts.curves("s", [("a", [(0.0, 1.0), (4.0, 2.0)])])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 200_000, [0, 50_000, 100_000, 150_000, 200_000]),
        (10, 80, [20, 40, 60, 80]),
        (0.0, 0.03, [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03][::2]),
        (-1.2, 1.1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 1000, [1, 10, 100, 1000]),
        (0.3, 20, [0.5, 1, 2, 5, 10, 20]),
        (0.94, 1.97, [1, 1.2, 1.4, 1.6, 1.8]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, expected: list[float]) -> None:
    assert charts.log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("hours", "unit", "times"),
    [(10.0, "hours", ["0", "5", "10"]), (0.5, "minutes", ["0", "15", "30"]), (0.02, "seconds", ["0", "36", "72"])],
)  # fmt: skip
def test_time_is_written_below_steps(hours: float, unit: str, times: list[str]) -> None:
    line = [(0.0, 1.0), (100.0, 2.0), (200.0, 3.0)]
    drawing = charts.curves("t", [("", line)], hours=[(0, 0.0), (200, hours)])
    texts = [
        (element.text, element.attrib["y"])
        for element in ElementTree.fromstring(drawing).iter("text")
    ]
    (row,) = {y for text, y in texts if text == unit}
    below = [text for text, y in texts if y == row and text != unit]
    assert below[:: len(below) // 2] == times
    assert "steps" in drawing
    assert "hours" not in charts.curves("t", [("", line)])


def test_curves_keep_their_colours_and_long_ones_are_thinned() -> None:
    long = [(float(x), float(x)) for x in range(5000)]
    drawing = charts.curves("a <b>", [("none yet", []), ("<long>", long), ("", [(3.0, 4.0)])])
    (line,) = places(drawing)
    assert len(line) <= charts.MOST_POINTS
    figure = ElementTree.fromstring(drawing)  # well formed, and all text escaped
    assert "".join(figure.itertext()).startswith("a <b>none yet<long>")
    assert figure.findall("svg/g[@style='color:var(--c1)']/polyline")
    assert figure.findall("svg/g[@style='color:var(--c2)']/circle")
    assert charts.curves("nothing", [("a", [])]) == ""


def test_marks_lie_where_their_numbers_do() -> None:
    first, second = (
        {"value": 1.0, "low": 0.0, "high": 2.0},
        {"value": 3.0, "low": None, "high": None},
    )
    drawing = charts.intervals("t", [("a", first), ("b", second), ("c", None)])
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawing)]
    inside = charts.WIDTH - 2 * charts.MARGIN
    assert dots == pytest.approx([charts.MARGIN + inside / 3, charts.MARGIN + inside], abs=0.1)
    assert drawing.count("<path") == 1
    assert "no score" in drawing
    assert charts.extent([5.0]) == (2.5, 7.5)
    assert charts.extent([]) == (-0.5, 0.5)


def test_a_long_name_does_not_reach_its_number() -> None:
    name, estimate = "<a>-" + 12 * "long-" + "name", {"value": 1.0, "low": None, "high": None}
    row = charts.Row(name, "+1.25 [+0.75, +1.75]", estimate, [], 0)
    forest = charts.forest("t", [row, charts.Row("short", "+1", estimate, [], 1)], higher=True)
    for drawing, text in (
        (forest, row.text),
        (charts.intervals("t", [(name, estimate), ("short", estimate)]), "1"),
    ):
        texts = ["".join(t.itertext()) for t in ElementTree.fromstring(drawing).iter("text")]
        (long,) = (t for t in texts if "…" in t)
        assert long.startswith(name)  # the tooltip
        shown = long.removeprefix(name)
        assert shown.startswith("<a>-long")
        assert shown.endswith("name")
        assert len(shown) + len(text) <= charts.LETTERS
        assert "short" in texts


def test_a_page_is_one_file() -> None:
    page = charts.document("<run>", "<p>body</p>")
    assert "<title>&lt;run&gt;</title>" in page
    assert "<p>body</p>" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"https?:|@import|url\(", page)


@pytest.mark.parametrize("higher", [True, False])
def test_the_right_half_of_a_forest_is_better_than_the_baseline(higher: bool) -> None:
    estimate = {"value": 1.0, "low": -1.0, "high": 2.0}
    rows = [
        charts.Row("<e2e>", "+1", estimate, [4.0, -2.0], 3),
        charts.Row("no score", "–", None, [], 4),
    ]
    drawing = charts.forest("t", rows, higher=higher)
    dot, *rings = (
        float(x) for x in re.findall(r'<circle(?: class="ring")? cx="([\d.]+)"', drawing)
    )
    quarter = (charts.WIDTH - 2 * charts.MARGIN) / 8  # a unit: the reach is 4 on both sides
    side = 1 if higher else -1
    middle = charts.WIDTH / 2
    assert dot == pytest.approx(middle + side * quarter, abs=0.1)
    assert rings == pytest.approx(
        [middle + side * 4 * quarter, middle - side * 2 * quarter], abs=0.1
    )
    ends = ["-4 worse", "0", "better +4"] if higher else ["+4 worse", "0", "better -4"]
    text = [element.text for element in ElementTree.fromstring(drawing) if element.tag == "text"]
    assert text == [*ends, "<e2e>", "+1", "no score", "–"]


def test_curves_of_one_colour_and_the_band_behind_them() -> None:
    lines = [("mean", [(0.0, 1.0), (10.0, 2.0)]), ("", [(0.0, 1.5), (10.0, 2.5)])]
    band = (5, [(0.0, 0.0, 1.5), (10.0, 1.0, 4.0)])
    drawing = charts.curves("score", lines, colours=[5, 5], thin={1}, bands=[band])
    figure = ElementTree.fromstring(drawing)
    assert len(figure.findall("svg/g[@style='color:var(--c5)']")) == 2
    assert len(figure.findall("svg/g[@class='thin']")) == 1
    (polygon,) = figure.findall("svg/polygon[@class='band']")
    corners = [tuple(map(float, p.split(","))) for p in polygon.attrib["points"].split()]
    lowest, highest = 8 + charts.CURVES_HEIGHT - charts.BOTTOM - 8, 8  # the band sets the axis
    assert corners[0] == (charts.LEFT, lowest)
    assert corners[2] == (charts.CURVES_WIDTH - 8, highest)
    assert "".join(figure.itertext()).startswith("scoremean")
