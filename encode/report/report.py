"""What became of every input row, and where the time went: report.json and the text at the end of a
run.

Each column's counts are added up from its commits and compared with the source index. They must
meet: a row that is neither ok nor of a named reason is a fault of the program, and is said.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.table import Table

from shards import ColumnSpec, Status, Store, canonical_json
from shards.console import render
from shards.format.atomic import Json, parse_json
from shards.format.layout import HAS_VALUES
from shards.tools.describe import describe

from ..config import EncodeConfig
from ..errors import EncodeError
from ..source.index import index_heads

SHOWN = 20  # failed shards that are printed; report.json has all
WIDTH = 200  # of tables, at most
MISSING = (Status.IMAGE_MISSING, Status.CAPTION_MISSING)
STAGES = ("read", "decode", "wait", "encode", "write")  # of a shard, in their order


class CountsDisagree(EncodeError, ValueError):
    """The rows of a column do not add up to those of its source."""


class Written(Protocol):
    """A column of a run: where it stands and what it is. `engine.Target` is one."""

    @property
    def store(self) -> Store: ...

    @property
    def digest(self) -> str: ...

    @property
    def spec(self) -> ColumnSpec: ...


class Task(Protocol):
    """A shard that failed. `engine.ShardTask` is one."""

    @property
    def name(self) -> str: ...

    @property
    def tar(self) -> Any: ...

    @property
    def number(self) -> int: ...

    @property
    def targets(self) -> Mapping[str, Written]: ...


@dataclass(frozen=True, slots=True)
class Report:
    """What a run ends with: a text, and the complete columns in which no row is usable, by url."""

    text: str
    useless: list[str]


def usable(counts: Mapping[str, int]) -> bool:
    """Whether any row has values."""
    return any(counts.get(status.name.lower()) for status in HAS_VALUES)


def write_report(
    root: Store, columns: Mapping[str, Written], failed: Sequence[tuple[Task, str]],
    run: Json | None, config: EncodeConfig, damaged: Mapping[str, str] | None = None,
) -> Report:  # fmt: skip
    """Write `<root>/report.json` and summarise the run.

    `columns` are all that the run was asked for, by url; `failed` its shards and why; `run` what the
    meter counted (as in progress.json), None where nothing was encoded; `damaged` says of columns by
    url what they lack though it is committed. Columns of earlier runs keep their entries. Raises
    CountsDisagree where rows are lost or doubled.
    """
    report = standing_report(root)
    heads: dict[str, dict[int, int]] = {}
    mine: dict[str, Json] = {}
    for url, target in sorted(columns.items()):
        folder = target.store.parent
        if folder.url not in heads:
            heads[folder.url] = index_heads(folder)
        entry = column_report(target, heads[folder.url], failed)
        if damaged and url in damaged:
            entry |= {"complete": None, "damaged": damaged[url]}
        if run is not None:
            entry["run"] = _of_run(run, url)
        elif isinstance(report.get(url), dict) and "run" in report[url]:
            entry["run"] = report[url]["run"]  # the last one that encoded anything
        mine[url] = entry
    root.replace("report.json", canonical_json(report | mine))
    useless = [u for u, e in mine.items() if e["complete"] is not None and not usable(e["counts"])]
    return Report(summary(mine, failed, run, config.allow_failed), useless)


def standing_report(root: Store) -> Json:
    """What earlier runs reported; empty if nothing readable stands."""
    try:
        found = parse_json(root.read("report.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def column_report(
    target: Written, heads: dict[int, int], failed: Sequence[tuple[Task, str]] = ()
) -> Json:
    """Returns rows by status, bytes and seconds by stage, added up over the commits of a column, and
    its failed shards, each with the tar where this run knows it from `failed`.

    Rows of shards that have an index and no commit count as SHARD_FAILED or, where nobody has tried
    them, as not encoded; shards without an index as unread. Raises CountsDisagree.
    """
    store, layout = target.store, target.spec.layout
    column = describe(store, (target.spec, target.digest))
    column.refuse_damage()
    # a second job may have committed since the heads were read
    heads |= index_heads(store.parent, column.commits.keys() - heads.keys())
    seconds: Counter[str] = Counter()
    others: Counter[str] = Counter()
    uncounted = 0
    for shard, commit in column.commits.items():
        if (rows := heads.get(shard)) != commit.rows:
            raise CountsDisagree(
                f"{store.url}: shard {shard} has {commit.rows:,} rows, the source index says "
                f"{'nothing of it' if rows is None else f'{rows:,}'}. Restore the index, or run "
                "`python -m shards verify`"
            )
        seconds.update(commit.provenance.get("seconds", {}))
        others.update(commit.provenance.get("passed_over", {}))
        missing = any(status in MISSING for _, _, status in commit.not_ok)
        uncounted += missing and "passed_over" not in commit.provenance
    counts = Counter(column.counts)
    for shard in heads.keys() - column.commits.keys():
        lost = Status.SHARD_FAILED.name.lower() if shard in column.failed else "not_encoded"
        counts[lost] += heads[shard]
    expected = sum(heads.values())
    if counts.total() != expected:
        raise CountsDisagree(
            f"{store.url}: {counts.total():,} rows are accounted for ({dict(counts)}), the "
            f"source index has {expected:,}. Run `python -m shards verify` on the column"
        )
    tars = {
        task.number: str(task.tar)
        for task, _ in failed
        if any(t.store.url == store.url for t in task.targets.values())
    }
    return {
        "rows": column.rows,
        "input_rows": expected,
        "counts": dict(sorted(counts.items())),
        "passed_over": dict(others.most_common()),  # rows without the column's member, by others
        "passed_over_unknown": uncounted,  # shards with such rows, by a program that did not count
        "bytes": column.bytes,
        "seconds": {stage: round(value, 3) for stage, value in sorted(seconds.items())},
        "shards": layout.shards,
        "committed": len(column.commits),
        "missing": layout.shards - len(column.commits),
        "unread": layout.shards - len(heads),
        "complete": column.snapshot and column.snapshot.digest,
        "failed": [
            {"shard": shard, "reason": reason} | ({"tar": tars[shard]} if shard in tars else {})
            for shard, reason in sorted(column.failed.items())
        ],
    }


def _of_run(run: Json, url: str) -> Json:
    """What the meter says of the run that was the last to ask for this column."""
    kept = ("started", "updated", "shards", "rows", "rows_per_s", "busy", "waits", "seconds", "cpu")
    found = {key: run[key] for key in kept if key in run}
    return found | {"column": run.get("columns", {}).get(url, {})}


# The text -----------------------------------------------------------------------------------------


def summary(
    columns: Mapping[str, Json], failed: Sequence[tuple[Task, str]], run: Json | None,
    allow_failed: bool = False,
) -> str:  # fmt: skip
    """The end of a run for a reader: rows by column, time by stage, what failed and what to do."""
    parts: list[Any] = [_line(url, entry, allow_failed) for url, entry in columns.items()]
    parts += [
        f"{url}: passed over, since the column reads one suffix only: "
        + ", ".join(f"{suffix!r} of {count:,} rows" for suffix, count in others.items())
        + (f" ({n:,} older shards are not counted)" if (n := entry["passed_over_unknown"]) else "")
        for url, entry in columns.items()
        if (others := entry["passed_over"])
    ]
    parts += [_rows_table(columns), _stage_table(columns)]
    if run is not None:
        parts.append(_run_line(run))
    for task, reason in failed[:SHOWN]:
        parts.append(f"FAILED {task.name} ({task.tar}): {reason}")
    if len(failed) > SHOWN:
        parts.append(f"... and {len(failed) - SHOWN} more; report.json has all")
    if failed:
        parts.append(
            "Mend or fetch the tars again, then: python -m encode retry-failed CONFIG. To complete "
            "the columns without them: python -m encode run CONFIG allow_failed=true"
        )
    return render(*parts, width=min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns))


def _line(url: str, entry: Json, allow_failed: bool) -> str:
    if "damaged" in entry:
        return f"NOT complete, DAMAGED: {entry['damaged']}"
    counts = ", ".join(f"{n:,} {name}" for name, n in _ordered(entry["counts"]))
    if entry["complete"] is not None and (allow_failed or not entry["missing"]):
        useless = "" if usable(entry["counts"]) else "but NO ROW IS USABLE, "
        return f"{url}: complete, {useless}{entry['rows']:,} rows: {counts}"
    lost = len(entry["failed"])
    left = f", {entry['missing'] - lost} not encoded yet" if entry["missing"] > lost else ""
    return f"{url}: NOT complete, {lost} shards failed{left}; {counts}"


def _ordered(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Statuses in the order of their numbers; what is no status last."""
    order = {status.name.lower(): int(status) for status in Status}
    return sorted(counts.items(), key=lambda item: order.get(item[0], 256))


def _table(names: Sequence[str], title: str) -> Table:
    """One row for each column, since there may be many; words of a heading may stand in two lines."""
    table = Table("column", *(name.replace("_", " ") for name in names), title=title)
    for shown in table.columns[1:]:
        shown.justify = "right"
    table.columns[0].no_wrap = True
    return table


def _rows_table(columns: Mapping[str, Json]) -> Table:
    """Every input row of each column, as ok or by reason; the sums have been checked."""
    reasons = [name for name, _ in _ordered({k: 0 for e in columns.values() for k in e["counts"]})]
    unread = any(e["unread"] for e in columns.values())
    names = [*reasons, "input", *(["tars not read"] if unread else []), "GB written"]
    table = _table(names, "what became of the input rows")
    for url, entry in columns.items():
        counts = [entry["counts"].get(reason, 0) for reason in reasons] + [entry["input_rows"]]
        counts += [entry["unread"]] if unread else []
        table.add_row(_column(url), *(f"{n:,}" for n in counts), f"{entry['bytes'] / 1e9:,.3f}")
    return table


def _stage_table(columns: Mapping[str, Json]) -> Table:
    """Seconds by stage over all commits, with milliseconds a row. A commit calls the time of its
    column's encoder by the column's name.
    """
    spent = {
        url: {
            "encode" if stage == _column(url).split("/")[-1] else stage: passed
            for stage, passed in entry["seconds"].items()
        }
        for url, entry in columns.items()
    }
    found = {stage for seconds in spent.values() for stage in seconds}
    stages = [s for s in STAGES if s in found] + sorted(found.difference(STAGES))
    table = _table(stages, "seconds, and ms a row")
    for url, seconds in spent.items():
        rows = max(columns[url]["rows"], 1)
        cells = (
            f"{seconds[s]:,.1f}  {1e3 * seconds[s] / rows:.2f}" if s in seconds else ""
            for s in stages
        )
        table.add_row(_column(url), *cells)
    return table


def _column(url: str) -> str:
    """The last two parts of a column's url: source and name."""
    return "/".join(url.rstrip("/").split("/")[-2:])


def _run_line(run: Json) -> str:
    words = [f"this run: {run.get('rows', 0):,} rows"]
    if run.get("rows_per_s") is not None:
        words.append(f"{run['rows_per_s']:,.1f} samples/s")
    if run.get("busy") is not None:
        words.append(f"encoders busy {100 * run['busy']:.0f} %")
    waits = run.get("waits", {})
    told = [f"{v:,.1f} s for {k}" for k, v in waits.items() if v > 0.01 * sum(waits.values())]
    if told:
        words.append("waited " + ", ".join(told))
    return "; ".join(words)
