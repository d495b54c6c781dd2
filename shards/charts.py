"""Charts and style of pages that are one HTML file with nothing from outside: inline SVG for light
and dark, coloured by the page's style (`--c0` to `--c7`, `currentColor`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

COLOURS = 8
WIDTH, MARGIN, ROW = 360, 8, 26  # of a chart of intervals and the height of its lines, in pixels
LETTERS = 50  # that fit beside each other into WIDTH
# of a chart of curves, the space left of it for numbers, and below it for steps and hours
CURVES_WIDTH, CURVES_HEIGHT, LEFT, BOTTOM = 480, 240, 64, 40
LONGEST_AXIS = 9  # letters of a name that fit into LEFT
MOST_POINTS = 400  # of a curve on the page

Estimate = Mapping[str, Any]  # "value", with "low" and "high" of its interval or None
Curve = tuple[str, Sequence[tuple[float, float]]]  # a name, and its points
Band = tuple[int, Sequence[tuple[float, float, float]]]  # a colour, and x with both ends
Mark = tuple[int, float, float]  # a colour, x and y


@dataclass(frozen=True)
class Meeting:
    """Where two curves, named by their colours, are at one height: `first` at an x, and `second` at
    another with an interval.
    """

    height: float
    first: tuple[int, float]
    second: tuple[int, Estimate]


def document(title: str, body: str) -> str:
    """Returns a page with a body of HTML below its title, which is text."""
    head = f"<header><h1>{html.escape(title)}</h1></header>"
    return page(title, f"{head}<main>{body}</main>")


def page(title: str, body: str) -> str:
    """Returns a page that needs nothing else, with the style and the script of all pages; `body` is
    HTML with a header and a main part.
    """
    folder = Path(__file__).parent
    style, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "pictures.js")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>\n{''.join(scripts)}</script>\n</body>\n</html>\n"
    )


def figure(value: float | None) -> str:
    """Returns a number for people: four significant digits."""
    return "unknown" if value is None else f"{value:,.4g}"


# Curves -------------------------------------------------------------------------------------------


def curves(
    title: str,
    lines: Sequence[Curve],
    *,
    log: bool = False,
    log_x: bool = False,
    colours: Sequence[int] | None = None,
    thin: Collection[int] = (),
    bands: Sequence[Band] = (),
    meetings: Sequence[Meeting] = (),
    marks: Sequence[Mark] = (),
    numbers: Sequence[float] = (),
    hours: Sequence[tuple[float, float]] = (),
    axis: str = "steps",
) -> str:
    """Returns named curves on common axes, empty text where no curve has a point.

    The vertical axis is logarithmic if `log` is set and all values are above 0, the horizontal one
    likewise by `log_x`. Curves have `colours`, else one each; those whose index is in `thin` are
    faint. `bands` lie behind them, and `meetings` before: a dashed line at the height, a ring, and
    a dot whose interval is open at an end that the axis does not reach. `marks` are dots in rings. The
    horizontal axis has `numbers`, else round ones.
    `hours` (x, hours) add the time below the numbers of the horizontal axis: hours, or minutes or
    seconds of a short run.
    """
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    points += [(x, end) for _, band in bands for x, *ends in band for end in ends]
    for meeting in meetings:
        points += [(x, meeting.height) for x in (meeting.first[1], meeting.second[1]["value"])]
    hues = range(len(lines)) if colours is None else colours
    log = log and min(y for _, y in points) > 0
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    log_x = log_x and first > 0
    left, right = (math.log10(x) if log_x else x for x in (first, last))
    low, high = extent(math.log10(y) if log else y for _, y in points)
    width, height = CURVES_WIDTH - LEFT - 8, CURVES_HEIGHT - BOTTOM - 8

    def across(x: float) -> float:
        return LEFT + width * ((math.log10(x) if log_x else x) - left) / ((right - left) or 1)

    def down(y: float) -> float:
        return 8 + height * (high - (math.log10(y) if log else y)) / (high - low)

    shapes = [
        f'<path class="grid" d="M{LEFT} {down(y):.1f}h{width}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{figure(y)}</text>'
        for y in (log_ticks(10**low, 10**high) if log else ticks(low, high))
    ]
    bottom = CURVES_HEIGHT - BOTTOM
    unit, scale = unit_of_time(hours[-1][1]) if hours else ("", 1)
    if not numbers:
        numbers = log_ticks(first, last, most=6) if log_x and last > first else ticks(first, last)
    for x in numbers:
        place = across(x)
        anchor = "end" if place > CURVES_WIDTH - 24 else "start" if place < LEFT + 16 else "middle"
        shapes.append(
            f'<path class="grid" d="M{place:.1f} {bottom}v-{height}"/>'
            f'<text class="axis" x="{place:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{figure(x)}</text>'
        )
        if hours:
            text = f"{_between(hours, x) * scale:.3g}"
            shapes.append(
                f'<text class="axis" x="{place:.1f}" y="{bottom + 29}" text-anchor="{anchor}">{text}</text>'
            )
    # a name that has no room left of the first number has the line below, which is free without hours
    below = ["", axis] if len(axis) > LONGEST_AXIS and not unit else [axis, unit]
    for i, name in enumerate(below):
        if name:
            shapes.append(
                f'<text class="axis" x="2" y="{bottom + 14 + 15 * i}">{html.escape(name)}</text>'
            )
    for hue, band in bands:
        edge = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
        corners = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in edge)
        shapes.append(f'<polygon class="band" style="color:{_colour(hue)}" points="{corners}"/>')
    for i, (_, line) in enumerate(lines):
        places = [(across(x), down(y)) for x, y in thinned(line)]
        shape = f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
        if len(places) == 1:
            shape = f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
        faint = ' class="thin"' if i in thin else ""
        shapes.append(f'<g{faint} style="color:{_colour(hues[i])}">{shape}</g>' if places else "")
    shapes += [_meeting(meeting, across, down) for meeting in meetings]
    for hue, x, y in marks:
        centre = f'cx="{across(x):.1f}" cy="{down(y):.1f}"'
        dot = f'<circle {centre} r="3"/><circle class="ring" {centre} r="6"/>'
        shapes.append(f'<g style="color:{_colour(hue)}">{dot}</g>')
    names = "".join(
        f'<span class="name"><span class="chip" style="background:{_colour(hue)}"></span>{html.escape(name)}</span>'
        for hue, (name, _) in zip(hues, lines, strict=True) if name
    )  # fmt: skip
    return (
        f'<figure class="curves"><figcaption>{html.escape(title)}{names}</figcaption>'
        f"{_svg(f'{title}, over {axis}', CURVES_WIDTH, CURVES_HEIGHT, shapes)}</figure>"
    )


def _meeting(
    meeting: Meeting, across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    y, (hue, x) = down(meeting.height), meeting.first
    colour, estimate = meeting.second
    end, edge = across(estimate["value"]), CURVES_WIDTH - 8
    whisker = ""
    if estimate["low"] is not None:
        ends = [across(estimate[key]) for key in ("low", "high")]
        bars = "".join(f"M{end:.1f} {y - 4:.1f}v8" for end in ends if LEFT <= end <= edge)
        start, stop = (min(max(end, LEFT), edge) for end in ends)
        whisker = f'<path class="whisker" d="M{start:.1f} {y:.1f}H{stop:.1f}{bars}"/>'
    return (
        f'<path class="zero" d="M{LEFT} {y:.1f}H{max(across(x), end):.1f}"/>'
        f'<g style="color:{_colour(hue)}"><circle class="ring" cx="{across(x):.1f}" cy="{y:.1f}" r="5"/></g>'
        f'<g style="color:{_colour(colour)}">{whisker}<circle cx="{end:.1f}" cy="{y:.1f}" r="4"/></g>'
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers from `low` to `high`, evenly apart: at most `most`, at least two if low < high."""
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
        size = power * factor
        count = math.floor(high / size + 1e-9) - math.ceil(low / size - 1e-9) + 1
        if count <= most:
            break
    start = math.ceil(low / size - 1e-9)
    return [round((start + i) * size, 12) for i in range(count)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Returns round numbers from `low` to `high` (above 0) of a logarithmic axis: powers of ten, with 2
    and 5 times them where there are few, or evenly apart where the axis is a small part of a decade.
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        numbers = [float(f"{factor}e{n}") for n in exponents for factor in factors]
        inside = [x for x in numbers if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / most)]
    return ticks(low, high, 5)


def unit_of_time(hours: float) -> tuple[str, float]:
    """Returns the unit in which a run of this length is written, and how many of it are an hour."""
    if hours >= 1:
        return "hours", 1
    return ("minutes", 60) if hours >= 1 / 30 else ("seconds", 3600)


def _between(line: Sequence[tuple[float, float]], x: float) -> float:
    """Returns the height at x of a line whose points rise in x, its ends prolonged level."""
    for (x0, y0), (x1, y1) in pairwise(line):
        if x <= x1:
            return y0 if x <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[-1][1]


def thinned(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most MOST_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(line) / MOST_POINTS) or 1
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


# Intervals ----------------------------------------------------------------------------------------


def intervals(
    title: str,
    lines: Sequence[tuple[str, Estimate | None]],
    points: Sequence[Sequence[float]] | None = None,
) -> str:
    """Returns a line an estimate, on one scale: text above, dot and whisker below, in its own colour.

    Further `points` of a line are rings. A line without an estimate is empty.
    """
    rings = points or [[] for _ in lines]
    estimates = [estimate for _, estimate in lines if estimate]
    low, high = reach(estimates, *rings)
    height = ROW * len(lines) + 18
    shapes = [_axis(low, high, height)]
    for i, (name, estimate) in enumerate(lines):
        y = ROW * i
        text = figure(estimate["value"]) if estimate else "no score"
        shapes.append(
            f'<text x="{MARGIN}" y="{y + 11}">{_name(name, text)}</text>'
            f'<text x="{WIDTH - MARGIN}" y="{y + 11}" text-anchor="end">{text}</text>'
        )
        if estimate:
            shapes.append(_mark(estimate, low, high, y + 19, _colour(i)))
        shapes += [
            f'<g style="color:{_colour(i)}"><circle class="ring" cx="{_across(number, low, high):.1f}" '
            f'cy="{y + 19}" r="5"/></g>'
            for number in rings[i]
        ]  # fmt: skip
    return _svg(title, WIDTH, height, shapes, "plot")


def groups(
    title: str,
    names: Sequence[str],
    sets: Sequence[Mapping[str, Estimate]],
    colours: Sequence[int],
) -> str:
    """Returns a line of text a group, and below it a mark a set in its colour, on one scale."""
    low, high = reach([estimate for estimates in sets for estimate in estimates.values()])
    step = 9
    row = 16 + step * len(sets)
    height = row * len(names) + 18
    shapes = [_axis(low, high, height)]
    for i, name in enumerate(names):
        shapes.append(f'<text x="{MARGIN}" y="{row * i + 11}">{html.escape(name)}</text>')
        shapes += [
            _mark(estimates[name], low, high, row * i + 18 + step * j, _colour(colours[j]))
            for j, estimates in enumerate(sets)
            if name in estimates
        ]
    return _svg(title, WIDTH, height, shapes, "plot")


@dataclass(frozen=True)
class Row:
    """A difference from a baseline: its name, its numbers as text, and each seed's own as points."""

    name: str
    text: str
    estimate: Estimate | None
    points: Sequence[float]
    colour: int


def forest(title: str, rows: Sequence[Row], *, higher: bool) -> str:
    """Returns a line a difference beside zero, on one scale whose right half is better than the
    baseline: larger values lie there if `higher` is better, else smaller ones. Points are rings.
    """
    estimates = [row.estimate for row in rows if row.estimate]
    most = max(map(abs, reach(estimates, [0.0], *(row.points for row in rows))))
    side = 1 if higher else -1  # left and right are exchanged where smaller is better
    height, middle = ROW * len(rows) + 18, WIDTH // 2
    shapes = [
        *(f'<path d="M{middle} {ROW * i + 13}v12" class="zero"/>' for i in range(len(rows))),
        f'<text class="axis" x="{MARGIN}" y="{height - 3}">{-side * most:+,.3g} worse</text>',
        f'<text class="axis" x="{middle}" y="{height - 3}" text-anchor="middle">0</text>',
        f'<text class="axis" x="{WIDTH - MARGIN}" y="{height - 3}" text-anchor="end">'
        f"better {side * most:+,.3g}</text>",
    ]
    for i, row in enumerate(rows):
        y, colour = ROW * i, _colour(row.colour)
        shapes.append(
            f'<text x="{MARGIN}" y="{y + 11}">{_name(row.name, row.text)}</text>'
            f'<text x="{WIDTH - MARGIN}" y="{y + 11}" text-anchor="end">{html.escape(row.text)}</text>'
        )
        if row.estimate:
            shapes.append(_mark(row.estimate, -side * most, side * most, y + 19, colour))
        rings = "".join(
            f'<circle class="ring" cx="{_across(x, -side * most, side * most):.1f}" cy="{y + 19}" r="5"/>'
            for x in row.points
        )
        shapes.append(f'<g style="color:{colour}">{rings}</g>' if rings else "")
    return _svg(title, WIDTH, height, shapes, "plot")


def reach(estimates: Iterable[Estimate], *points: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of what the estimates with their intervals and the points reach, never equal."""
    ends = [estimate[key] for estimate in estimates for key in ("value", "low", "high")]
    numbers = [number for number in ends if number is not None]
    return extent(chain(numbers, *points))


def extent(numbers: Iterable[float]) -> tuple[float, float]:
    """Returns the smallest and largest number, never equal."""
    numbers = list(numbers) or [0.0]
    low, high = min(numbers), max(numbers)
    half = 0.0 if low < high else (abs(low) or 1.0) / 2
    return low - half, high + half


# Marks --------------------------------------------------------------------------------------------


def _colour(i: int) -> str:
    return f"var(--c{i % COLOURS})"


def _name(name: str, text: str) -> str:
    """Returns a name that has room left of a text in its line, else without its middle and with a
    tooltip.
    """
    room = LETTERS - len(text)
    if len(name) <= room:
        return html.escape(name)
    end = max(room - 1, 2) // 2
    short = f"{name[: max(room - 1 - end, 1)]}…{name[-end:]}"
    return f"<title>{html.escape(name)}</title>{html.escape(short)}"


def _across(number: float, low: float, high: float) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * (number - low) / (high - low)


def _mark(estimate: Estimate, low: float, high: float, y: int, colour: str) -> str:
    whisker = ""
    if estimate["low"] is not None:
        start, end = (_across(estimate[key], low, high) for key in ("low", "high"))
        whisker = (
            f'<path d="M{start:.1f} {y}H{end:.1f}M{start:.1f} {y - 3}v6M{end:.1f} {y - 3}v6"/>'
        )
    dot = f'<circle cx="{_across(estimate["value"], low, high):.1f}" cy="{y}" r="3.5"/>'
    return f'<g style="color:{colour}">{whisker}{dot}</g>'


def _axis(low: float, high: float, height: int) -> str:
    return (
        f'<text class="axis" x="{MARGIN}" y="{height - 3}">{figure(low)}</text>'
        f'<text class="axis" x="{WIDTH - MARGIN}" y="{height - 3}" text-anchor="end">{figure(high)}</text>'
    )


def _svg(title: str, width: int, height: int, shapes: Iterable[str], kind: str = "") -> str:
    size = f'class="{kind}"' if kind else f'width="{width}" height="{height}"'
    return (
        f'<svg {size} viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(shapes)}</svg>"
    )
