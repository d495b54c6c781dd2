"""How far the columns of a config are, and what a run is doing at this moment.

    python -m encode status CONFIG
    python -m encode status CONFIG --watch        # until the run ends; Ctrl-C leaves it alone
    python -m encode status CONFIG --json

Nothing is loaded and nothing is written: shards come from one listing of each column, rows from its
COMPLETE record or its commits, and the rest from `<root>/progress.json`, which a run replaces every
few seconds. Sizes of committed objects are compared once (of an object store by a listing of each
array). Exit code 0, or 3 if shards have failed, a column lacks what is committed, a complete one has
no usable row, or most of its rows lack the picture or caption that it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field
from rich.table import Table

import configs
from shards import CorruptColumn, NotAColumn, Store, describe, open_store
from shards.console import config_words, counted, duration_text, next_text, render, size_text
from shards.format.atomic import Json, parse_json
from shards.format.checks import Count, Fields, Text, check
from shards.printing import raw

from ..config import EncodeConfig
from .report import SHOWN, mostly_lost, next_words, read_report, usable

PROGRESS = "progress.json"
FORMAT = "latentbank-progress"
SILENT = 60.0  # seconds without a word after which a run is not taken for alive
EVERY = 5.0
QUARANTINED = 3
ADVICE = {
    "decode": "decode-bound: raise engine.threads, or engine.remote_decode where other nodes idle",
    "read": "read-bound: tars come too slowly; put engine.scratch on a fast disk or tars nearer",
    "write": "write-bound: the target takes columns too slowly",
    "idle": "short of work: fewer shards than workers, or the tail of the run",
}
BUSY = 0.9  # share of the time; a busier encoder waits for nothing worth a word


class _Shards(Fields):
    total: Count = 0
    done: Count = 0
    failed: Count = 0
    running: Count = 0


class RunRecord(Fields):
    """What progress.json says, as far as it is read here."""

    format: Literal["latentbank-progress"]
    updated: float = 0
    pid: Annotated[int, Field(ge=1, lt=1 << 31)] = 1
    host: Text = ""
    rows: Count = 0
    rows_per_s: float = 0
    shards: _Shards = _Shards()
    eta_s: float | None = None
    busy: float | None = None
    waits: dict[Text, float] = {}


# Columns ------------------------------------------------------------------------------------------


def column_status(store: Store, reported: Json | None = None, sizes: bool = False) -> Json:
    """Returns shards and rows of one column, as they are now. `reported` is its entry in
    report.json: if that is of this COMPLETE record and `sizes` are not compared, no commit is read.
    """
    status: Json
    if store.size("column.json") is None:
        status = {"begun": False, "shards": None, "committed": 0, "failed": {}, "complete": None}
        if store.list("commits"):
            status["lost"] = (
                "column.json is missing, though shards are committed. Copy it if the column was copied "
                "in part; a run writes it again"
            )
        return status
    column = describe(store, commits=False)
    status = {
        "begun": True,
        "shards": column.spec.layout.shards,
        "committed": len(column.committed),
        "failed": column.failed,
        "missing": len(column.missing),
        "complete": None,
    }
    with suppress(NotAColumn, CorruptColumn):  # `lost` says it
        if snapshot := column.snapshot:
            status["complete"] = snapshot.digest
            current = not sizes and reported and reported.get("complete") == snapshot.digest
            if reported and current and not column.lost(sizes=False):
                rows, counts = sum(snapshot.rows), snapshot.counts
                return status | {"rows": rows, "counts": counts, "bytes": reported["bytes"]}
    column.read_commits()
    status |= {"rows": column.rows, "counts": column.counts, "bytes": column.bytes}
    notes = {"damaged": len(column.damaged), "lost": column.lost(sizes)}
    return status | {name: note for name, note in notes.items() if note}


# The run ------------------------------------------------------------------------------------------


def read_progress(root: Store) -> Json | None:
    """Returns what the last run said of itself; None if there is nothing that can be read."""
    try:
        run: Json = parse_json(root.read(PROGRESS))
        check(RunRecord, run)
        return run
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def is_alive(run: RunRecord, now: float) -> bool:
    """Returns whether the process that wrote this still runs, as far as can be told from here."""
    if now - run.updated > SILENT:
        return False
    if run.host == platform.node():
        try:
            os.kill(run.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
    return True  # elsewhere it wrote a moment ago


def in_words(run: RunRecord, alive: bool, now: float) -> list[str]:
    """Returns lines on what the run does, and what it waits for."""
    shards, age = run.shards, max(0.0, now - run.updated)
    ended = shards.done + shards.failed >= shards.total
    state = "running" if alive else "ended" if ended else "not running any more"
    lines = [
        f"run         {state}: process {run.pid} on {run.host}, last heard of {age:.0f} s ago",
        f"shards      {shards.done:,} of {shards.total:,} done in this run, {shards.failed:,} "
        f"failed, {shards.running if alive else 0:,} in flight",
        f"rate        {run.rows_per_s:,.1f} samples/s, {counted(run.rows, 'row')}",
    ]
    if alive and run.eta_s is not None:
        lines.append(f"ETA         {duration_text(run.eta_s)}")
    if run.busy is not None:
        lines.append(f"encoders    {100 * run.busy:.0f} % busy; {waiting_for(run)}")
    return lines


def waiting_for(run: RunRecord) -> str:
    """Returns the greatest reason of waiting in words, with what would help."""
    if (run.busy or 0) >= BUSY:
        return "that is as it should be"
    total = sum(run.waits.values())
    if not total:
        return "no waits counted"
    reason = max(run.waits, key=lambda name: run.waits[name])
    share = run.waits[reason] / total
    return f"{ADVICE.get(reason, f'it waits for {reason}')} ({100 * share:.0f} % of the waiting)"


# The command --------------------------------------------------------------------------------------


def status(config: EncodeConfig, now: float | None = None, sizes: bool = True) -> Json:
    """Returns the status of every column and of the run as JSON."""
    now = time.time() if now is None else now
    root = config.root_store
    reported, run, columns = read_report(root), read_progress(root), dict[str, Json]()
    for source in config.sources:
        for name in config.columns:
            store = root.child(source).child(name)
            try:
                entry = column_status(store, reported.get(store.url), sizes)
            except NotAColumn as error:  # between two objects of a column that is just begun
                entry = {"begun": False, "error": str(error), "failed": {}}
            columns[f"{source}/{name}"] = entry
    if run is not None:
        typed = RunRecord.model_validate(run)
        alive = is_alive(typed, now)
        run |= {"alive": alive, "words": in_words(typed, alive, now)}
    return {"root": open_store(config.root).url, "columns": columns, "run": run}


def as_text(record: Json, config: str, after: Sequence[str] = ()) -> str:
    """Returns the status for a reader; `config` is as it is typed, with what is set over it, and
    `after` the words of the command that follows complete columns.
    """
    table = Table("column", "shards", "failed", "missing", "rows", "bytes", "rows by status")
    for heading in table.columns[1:6]:
        heading.justify = "right"
    failed, damaged = [], []
    for name, column in record["columns"].items():
        failed += [
            f"FAILED {name}/{int(s):05d}: {reason}" for s, reason in column["failed"].items()
        ]
        damaged += [f"DAMAGED {name}: {column['lost']}"] if column.get("lost") else []
        if not column.get("shards"):
            table.add_row(name, "", "", "", "", "", "not begun")
            continue
        counts = ", ".join(f"{n:,} {status}" for status, n in column["counts"].items())
        state = "complete: " if column["complete"] else ""
        if _useless(column):
            state = "complete, MOST ROWS ARE LOST: "
        if _useless(column) and not usable(column["counts"]):
            state = "complete, NO ROW IS USABLE: "
        if column.get("lost"):
            state = "DAMAGED: "
        table.add_row(
            name, f"{column['committed']:,} of {column['shards']:,}", f"{len(column['failed']):,}",
            f"{column['missing']:,}", f"{column['rows']:,}", size_text(column["bytes"]),
            state + counts,
        )  # fmt: skip
    lines = [*(record["run"] or {}).get("words", ["run         none is known here"]), *damaged]
    lines += failed[:SHOWN]
    if len(failed) > SHOWN:
        lines.append(f"... and {len(failed) - SHOWN} more; --json has all")
    if failed:
        lines.append(f"mend or fetch the tars, then: python -m encode retry-failed {config}")
    elif not (record["run"] or {}).get("alive"):
        if not _all_complete(record):
            lines.append(f"next: python -m encode run {config}")
        elif after and not damaged and not any(map(_useless, record["columns"].values())):
            lines.append(next_text(*after))
    return render(table, *lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m encode status`."""
    config_words(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--watch", action="store_true", help="again every few seconds")


def run_status(args: argparse.Namespace) -> int:
    """`python -m encode status`."""
    config = configs.load(EncodeConfig, args.config, args.overrides)
    words = shlex.join(map(str, [args.config, *args.overrides]))
    lost: dict[str, str] | None = None  # what the first look found to be missing
    while True:
        record = status(config, sizes=lost is None)
        columns = record["columns"]
        if lost is None:
            lost = {name: c["lost"] for name, c in columns.items() if c.get("lost")}
        for name, message in lost.items():
            columns[name]["lost"] = message
        as_json = json.dumps(record, indent=1) if args.json else ""
        text = as_json or as_text(record, words, next_words(config))
        if args.watch and (terminal := raw(sys.stdout)).isatty():
            terminal.write("\x1b[H\x1b[J")
        print(text, flush=True)
        if not (args.watch and record["run"] and record["run"]["alive"]):
            bad = any(c["failed"] or c.get("lost") or _useless(c) for c in columns.values())
            return QUARANTINED if bad else 0
        try:
            time.sleep(EVERY)
        except KeyboardInterrupt:
            return 0


def _all_complete(record: Json) -> bool:
    return all(column.get("complete") for column in record["columns"].values())


def _useless(column: Json) -> bool:
    """Returns whether a column is complete and has no usable row, or most rows lack their member."""
    counts = column.get("counts")
    return bool(column.get("complete")) and (not usable(counts or {}) or mostly_lost(column))
