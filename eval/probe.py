"""`python -m eval probe COLUMN... [--text COLUMN]`: columns of latents judged before anything is trained.

All columns of one call are read at the same rows, those that are valid in each of them and in the
text column. The JSON has a record a column (`shards.probe.Panel.record`), the page says of each
figure what it says and what it does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import Column, ShardsError, atomic_write, canonical_json
from shards.console import Bar, render
from shards.printing import printable
from shards.probe import ColumnRows, caption_groups, common_rows, evenly, panel, pooled_text, work
from shards.read import check_kind
from shards.store import Place
from train.model import FlowConfig, fixed_sigmas, schedule_sigmas

from .errors import BadRequest
from .report.panel import FIGURES, page, value_of

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-probe", 1
MOST_ROWS = 8192  # as captions need a table of rows by rows


def run(args: argparse.Namespace) -> None:
    """Probes the columns, prints a table, and writes what is asked for."""
    outputs: list[Path] = [path for path in (args.json, args.out) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise BadRequest(f"{args.out}: found one file for --json and --out, expected two")
    for path in outputs:
        if not path.parent.is_dir() or path.is_dir():
            raise BadRequest(
                f"{path}: found no folder to write to, expected a file in one that exists"
            )
    record = probe(args.columns, args.text, args.rows, args.groups, args.together)
    print(as_text(record))
    if args.json is not None:
        atomic_write(args.json, canonical_json(record))
    if args.out is not None:
        atomic_write(args.out, printable(page(record)).encode())
    for path in outputs:
        print(path)


@dataclass(frozen=True)
class _Request:
    """What is read of all columns."""

    columns: list[Column]
    text: Column | None
    rows: NDArray[np.int64]


def probe(
    columns: Sequence[Place], text: Place | None = None, rows: int = 2048,
    groups: str | None = None, together: str | None = None,
) -> Json:  # fmt: skip
    """Returns the record of columns; a ShardsError or BadRequest says what none can be made of."""
    request = _opened(columns, text, rows)
    first = request.columns[0]
    group, no_groups = caption_groups(first, request.rows, request.text, groups)
    alike = None
    if together is not None:
        alike, why = caption_groups(first, request.rows, None, together)
        if alike is None:  # without it the figures given the caption are too low
            raise BadRequest(f"{first.path}: --together {together!r} needs the rows' keys: {why}")
    pooled, no_text = None, "no text column: name one by --text"
    if request.text is not None and request.text.layout.kind == "ids":
        no_text = "a column of ids: it has no hidden states, of which captions are compared"
    elif request.text is not None:
        pooled = pooled_text(request.text, request.rows)
    schedules = {"fixed": fixed_sigmas(), "training": schedule_sigmas(FlowConfig())}
    panels = []
    for column in request.columns:
        latents = ColumnRows(column, request.rows)
        with Bar(column.name, work(latents), "rows") as bar:
            try:
                result = panel(
                    latents, schedules, pooled, together=alike, no_text=no_text, groups=group,
                    no_groups=no_groups, advance=bar.advance,
                )  # fmt: skip
            except ShardsError as error:
                if column.path in str(error):
                    raise
                raise type(error)(f"{column.path}: {error}") from None
        about = {
            "column": column.path, "name": column.name, "digest": column.digest,
            "complete": column.snapshot.digest, "norm": column.spec.norm and column.spec.norm.summary(),
        }  # fmt: skip
        panels.append(about | result.record())
    return {
        "format": FORMAT, "version": VERSION,
        "text": request.text and {"column": request.text.path, "digest": request.text.digest},
        "groups": groups, "together": together, "columns": panels,
    }  # fmt: skip


def _opened(columns: Sequence[Place], text: Place | None, rows: int) -> _Request:
    """Returns the open columns and the rows that are read."""
    if rows > MOST_ROWS:
        raise BadRequest(f"found --rows {rows:,}, expected at most {MOST_ROWS:,}")
    latents = [Column.open(place) for place in columns]
    for column in latents:
        check_kind(column, "moments", "latents")
        _ = ColumnRows(column, np.zeros(0, np.int64)).norm  # without one nothing is compared
    captions = None if text is None else Column.open(text)
    if captions is not None:
        check_kind(captions, "tokens", "ids")
    every = [*latents, *([] if captions is None else [captions])]
    return _Request(latents, captions, evenly(common_rows(every), rows))


def as_text(record: Json) -> str:
    """Returns the table for a terminal: a column a row."""
    from rich.table import Table

    table = Table("column", "rows", "shape", "deviations")
    for about in FIGURES.values():
        table.add_column(about.title, justify="right")
    for column in record["columns"]:
        deviations = column["channel_deviations"]
        table.add_row(
            column["name"], f"{column['rows']:,}", " x ".join(map(str, column["shape"])),
            f"{min(deviations):.3g} to {max(deviations):.3g}",
            *(value_of(column, name) for name in FIGURES),
        )  # fmt: skip
    notes = {
        f"{about.title}: {why}"
        for column in record["columns"]
        for name, about in FIGURES.items()
        if (why := column[name].get("why"))
    }
    return render(table, *sorted(notes))
