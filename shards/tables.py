"""Tables that fit a terminal: widths by which no number is cut, or a line for each cell where no such
widths exist.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich is loaded where something is drawn
    from rich.console import Console
    from rich.table import Column, Table

NO_TERMINAL = 1_000_000  # characters of a line
MOST_FIGURE = 24  # characters of a figure; what is longer are words
LEAST_FOLDED = 16  # characters of a column whose words may be cut, such as paths


def terminal_width(most: int) -> int:
    """Returns the columns of the terminal, or of COLUMNS, but at most so many; `most` elsewhere."""
    columns = shutil.get_terminal_size((most, 0)).columns
    return min(most, columns) if columns > 0 else most


def wrapped(text: str, indent: str) -> Iterator[str]:
    """Yields the lines of a text, on a terminal cut between words, and what follows a cut indented."""
    width = terminal_width(NO_TERMINAL)
    for line in text.split("\n"):
        yield from textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
            replace_whitespace=False,
        ) if len(line) > width else [line]  # fmt: skip


def fitted(table: Table, console: Console, width: int) -> Table | str:
    """Returns the table with columns that together are at most `width` wide, in which words and
    numbers are whole (words of columns that fold may be cut); as lines where that cannot be.
    """
    least, most = zip(*map(_widths, table.columns), strict=True)
    borders = _borders(table, console)
    spare = width - borders - sum(least)
    if spare < 0:
        return "\n".join(_as_lines(table, width))
    if width >= borders + sum(most):
        return table
    widths = list(least)
    for i in sorted(
        range(len(widths)), key=lambda i: most[i] - least[i]
    ):  # what needs little first
        widths[i] += min(spare, most[i] - least[i])
        spare -= widths[i] - least[i]
    for column, column_width in zip(table.columns, widths, strict=True):
        column.width = column_width
    return table


def _widths(column: Column) -> tuple[int, int]:
    """Returns the least and the most characters that a column is of use with."""
    from rich.cells import cell_len

    cells = [str(cell) for cell in column.cells]
    lines = [line for text in (str(column.header), *cells) for line in text.split("\n")]
    most = max(map(cell_len, lines))
    whole = column.justify == "right" or column.no_wrap  # a figure with its unit stays on one line
    parts = [
        part
        for text in cells
        for part in ([text] if whole and cell_len(text) <= MOST_FIGURE else text.split())
    ]
    longest = max((cell_len(part) for part in parts), default=0)
    if column.overflow == "fold":
        longest = min(longest, LEAST_FOLDED)
    head = max(map(cell_len, str(column.header).split()), default=0)
    return max(1, longest, head), max(1, most)


def _borders(table: Table, console: Console) -> int:
    """Returns how wide the lines and spaces between the columns are."""
    wide = console.options.update(width=100_000)
    whole = console.measure(table, options=wide).maximum
    return whole - sum(_widths(column)[1] for column in table.columns)


def _as_lines(table: Table, width: int) -> Iterator[str]:
    """Yields each row as its first cell, and below it the others that are not empty, by name."""
    if table.title:
        yield str(table.title)
    names = [str(column.header) for column in table.columns]
    indent = max(map(len, names[1:]), default=0) + 4
    rows: Any = zip(*(column.cells for column in table.columns), strict=True)
    for first, *others in rows:
        yield f"{names[0]}: {first}" if names[0] else str(first)
        for name, cell in zip(names[1:], map(str, others), strict=True):
            for line in cell.split("\n") if cell else ():
                start = f"  {name:{indent - 4}}  "
                wrapped = textwrap.wrap(
                    line, max(width, indent + 1), initial_indent=start, break_long_words=False,
                    subsequent_indent=" " * indent, break_on_hyphens=False,
                )  # fmt: skip
                yield from wrapped
                name = ""
