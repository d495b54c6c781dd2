"""Small plots as inline SVG, which take their colours from the page's style (`--c0`, `--c1`, ..., `currentColor`)."""

import html
from collections.abc import Sequence

from ..scores.results import Value

COLOURS = 8  # --c0 to --c7
WIDTH, MARGIN, ROW = 360, 8, 26  # of a plot, and the height of a line in it
Named = tuple[str, Value | None]


def figure(value: float | None) -> str:
    """A number for people: four significant digits."""
    return "unknown" if value is None else f"{value:,.4g}"


def ends(values: Sequence[Value]) -> tuple[float, float]:
    """Smallest and largest number that any interval reaches, never equal."""
    found = [
        number for v in values for number in (v.value, v.low, v.high) if number is not None
    ] or [0.0]
    low, high = min(found), max(found)
    return (
        (low, high) if low < high else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)
    )


def intervals(
    title: str, lines: Sequence[Named], points: Sequence[Sequence[float]] | None = None
) -> str:
    """A value with its interval on each line, on one scale: text above, dot and whisker below. The i-th line has the
    i-th colour, and its i-th points as rings; one without a value is left empty."""
    rings = [[Value(number) for number in numbers] for numbers in points or [[] for _ in lines]]
    low, high = ends(
        [v for v in [*(v for _, v in lines), *(v for line in rings for v in line)] if v]
    )
    height = ROW * len(lines) + 18
    drawn = [_axis(low, high, height)]
    for i, (name, value) in enumerate(lines):
        at = ROW * i
        drawn.append(f'<text x="{MARGIN}" y="{at + 11}">{html.escape(name)}</text>')
        shown = figure(value.value) if value else "no score"
        drawn.append(f'<text x="{WIDTH - MARGIN}" y="{at + 11}" text-anchor="end">{shown}</text>')
        if value:
            drawn.append(_mark(value, low, high, at + 19, i))
        drawn += [_ring(ring.value, low, high, at + 19, i) for ring in rings[i]]
    return _svg(title, height, drawn)


def groups(
    title: str, names: Sequence[str], sets: Sequence[dict[str, Value]], colours: Sequence[int]
) -> str:
    """For each group a line of text and below it a mark of each set in its colour, on one scale."""
    low, high = ends([value for values in sets for value in values.values()])
    step = 9
    each = 16 + step * len(sets)
    height = each * len(names) + 18
    drawn = [_axis(low, high, height)]
    for row, name in enumerate(names):
        drawn.append(f'<text x="{MARGIN}" y="{each * row + 11}">{html.escape(name)}</text>')
        for i, values in enumerate(sets):
            if name in values:
                at = each * row + 18 + step * i
                drawn.append(_mark(values[name], low, high, at, colours[i]))
    return _svg(title, height, drawn)


def difference(title: str, value: Value) -> str:
    """A difference's interval beside zero."""
    reach = max(abs(n) for n in (value.value, value.low or 0, value.high or 0)) or 1.0
    middle = WIDTH / 2
    zero = f'<path d="M{middle} 0V16" class="zero"/>'
    return _svg(title, 16, [zero, _mark(value, -reach, reach, 8, None)])


def _place(number: float, low: float, high: float) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * (number - low) / (high - low)


def _mark(value: Value, low: float, high: float, y: int, colour: int | None) -> str:
    style = "currentColor" if colour is None else f"var(--c{colour % COLOURS})"
    drawn = ""
    if value.low is not None and value.high is not None:
        left, right = (_place(end, low, high) for end in (value.low, value.high))
        drawn = (
            f'<path d="M{left:.1f} {y}H{right:.1f}M{left:.1f} {y - 3}v6M{right:.1f} {y - 3}v6"/>'
        )
    dot = f'<circle cx="{_place(value.value, low, high):.1f}" cy="{y}" r="3.5"/>'
    return f'<g style="color:{style}">{drawn}{dot}</g>'


def _ring(number: float, low: float, high: float, y: int, colour: int) -> str:
    at = _place(number, low, high)
    style = f"color:var(--c{colour % COLOURS})"
    return f'<g style="{style}"><circle class="ring" cx="{at:.1f}" cy="{y}" r="5"/></g>'


def _axis(low: float, high: float, height: int) -> str:
    return (
        f'<text class="axis" x="{MARGIN}" y="{height - 3}">{figure(low)}</text>'
        f'<text class="axis" x="{WIDTH - MARGIN}" y="{height - 3}" text-anchor="end">{figure(high)}</text>'
    )


def _svg(title: str, height: int, drawn: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(drawn)}</svg>"
    )
