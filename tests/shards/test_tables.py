"""Tables at the widths of terminals: nothing is cut, nothing is lost, no number is broken."""

from __future__ import annotations

import re

import pytest
from rich.table import Column, Table

from shards.console import counted, next_text, render
from shards.tables import wrapped

ROWS = [
    ("openmoji-train/vae-plain", "1,234,567", "12.50 GB", "1,234,000 ok, 567 truncated"),
    ("openmoji-train/text", "1,234,567", "987.65 MB", "1,234,567 ok"),
    ("a", "0", "0 bytes", ""),
]


def table() -> Table:
    right = [Column(name, justify="right") for name in ("rows", "bytes")]
    made = Table("column", *right, Column("rows by status"), title="columns")
    for row in ROWS:
        made.add_row(*row)
    return made


@pytest.mark.parametrize("width", [28, 34, 40, 50, 60, 70, 80, 120])
def test_every_cell_is_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = render(table())
    assert "…" not in text
    drawn = [line for line in text.splitlines() if set("━│┃┡") & set(line)]
    assert all(len(line) <= width for line in drawn)
    words = re.split(r"[\s│┃]+", text)
    for row in ROWS:
        for cell in row:
            assert all(word in words for word in cell.split()), (cell, text)
    assert all(head in words for head in ("column", "bytes", "status")) or not drawn
    for figure in (figure for row in ROWS for figure in row[1:3]):
        assert figure in text  # on one line, with its unit
    if width >= 80:
        assert drawn
    if width <= 40:
        assert not drawn


def test_lines_in_place_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "36")
    assert render(table()).splitlines() == [
        "columns",
        "column: openmoji-train/vae-plain",
        "  rows            1,234,567",
        "  bytes           12.50 GB",
        "  rows by status  1,234,000 ok, 567",
        "                  truncated",
        "column: openmoji-train/text",
        "  rows            1,234,567",
        "  bytes           987.65 MB",
        "  rows by status  1,234,567 ok",
        "column: a",
        "  rows            0",
        "  bytes           0 bytes",
    ]


def test_a_table_that_fits_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = render(table(), "a line that is longer than a terminal " * 9).splitlines()
    assert max(map(len, lines[:-1])) < 118
    assert len(lines[-1]) > 300


def test_paths_may_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    path = "/data/" + "folder/" * 15 + "picture.jpg"
    made = Table(Column("rows", justify="right"), Column("the first", overflow="fold"))
    made.add_row("1,234", path)
    text = render(made)
    assert "1,234" in text
    assert path in "".join(re.sub("[│ ]|1,234", "", line) for line in text.splitlines()[3:-1])
    assert max(map(len, text.splitlines())) <= 60


def test_lines_are_cut_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "latents     mean " + " ".join(["-0.25"] * 16)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert list(wrapped(f"a\n{line}", "    ")) == ["a", line]
    monkeypatch.setenv("COLUMNS", "60")
    first, *rest = wrapped(line, " " * 12)
    assert first == "latents     mean " + " ".join(["-0.25"] * 7)
    assert all(part.startswith(" " * 12 + "-0.25") and len(part) <= 60 for part in rest)
    assert sum(part.count("-0.25") for part in rest) == 9


def test_sentences_fit_a_terminal_and_commands_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    command = next_text("encode", "run", "a/config/of/a/long/name/encode.yaml", "engine.threads=2")
    text = render("word " * 20, "rate        " + "figure " * 12, command)
    *lines, last = text.splitlines()
    assert last == command
    assert max(map(len, lines)) <= 40
    assert [line[:12] for line in lines if "figure" in line] == ["rate        ", *[" " * 12] * 2]


def test_a_number_has_its_noun() -> None:
    assert [counted(n, "tar") for n in (0, 1, 2, 1234)] == [
        "0 tars",
        "1 tar",
        "2 tars",
        "1,234 tars",
    ]
    assert counted(2, "entry", "entries") == "2 entries"
