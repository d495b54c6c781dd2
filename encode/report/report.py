"""What became of every input row, and where the time went: report.json and the text at the end of a
run.

Each column's counts are added up from its commits and compared with the source index. They must
meet: a row that is neither ok nor of a named reason is a fault of the program, and is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from shards import Status, Store, canonical_json, describe
from shards.column import OR, suffix_read
from shards.console import counted, render, size_text
from shards.format import HAS_VALUES
from shards.format.atomic import Json, parse_json

from ..config import EncodeConfig
from ..errors import EncodeError
from ..source.index import index_heads
from ..tasks import ShardTask, Target

SHOWN = 20  # failed shards that are printed; report.json has all
WIDTH = 200  # of tables, at most
MISSING = (Status.IMAGE_MISSING, Status.CAPTION_MISSING)
# of progress.json, kept of the last run that asked for a column
RUN_FIELDS = (
    "started",
    "updated",
    "shards",
    "rows",
    "rows_per_s",
    "busy",
    "waits",
    "seconds",
    "cpu",
)
STAGES = ("read", "decode", "wait", "encode", "write")  # of a shard, in their order


class CountsDisagree(EncodeError, ValueError):
    """The rows of a column do not add up to those of its source."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run ends with: a text, and by url the complete columns in which no row is usable, or most
    lack what the column is made of.
    """

    text: str
    useless: list[str]


def usable(counts: Mapping[str, int]) -> bool:
    """Returns whether any row has values."""
    return any(counts.get(status.name.lower()) for status in HAS_VALUES)


def lost(entry: Json) -> int:
    """Returns how many rows of a column have no member that it reads."""
    return sum(entry["counts"].get(status.name.lower(), 0) for status in MISSING)


def mostly_lost(entry: Json) -> bool:
    """Returns whether more than half of the rows of a column have no member that it reads."""
    return bool(2 * lost(entry) > sum(entry["counts"].values()))


def write_report(
    root: Store, columns: Mapping[str, Target], failures: Sequence[tuple[ShardTask, str]],
    run: Json | None, config: EncodeConfig, damaged: Mapping[str, str] | None = None,
) -> Report:  # fmt: skip
    """Writes `<root>/report.json` and summarises the run.

    `columns` are all that the config names, by url; `failures` the shards that failed and why;
    `run` what progress.json says, None where nothing was encoded; `damaged` says of columns by url
    what they lack though it is committed. Columns of earlier runs keep their entries. Raises
    CountsDisagree where rows are lost or doubled.
    """
    report = read_report(root)
    heads: dict[str, dict[int, int]] = {}
    entries: dict[str, Json] = {}
    for url, target in sorted(columns.items()):
        folder = target.store.parent
        if folder.url not in heads:
            heads[folder.url] = index_heads(folder)
        entry = entries[url] = column_report(target, heads[folder.url], failures)
        if damaged and url in damaged:
            entry |= {"complete": None, "damaged": damaged[url]}
        if run is not None:
            entry["run"] = {key: run[key] for key in RUN_FIELDS if key in run}
            entry["run"]["column"] = run.get("columns", {}).get(url, {})
        elif isinstance(report.get(url), dict) and "run" in report[url]:
            entry["run"] = report[url]["run"]  # the last one that encoded anything
    root.replace("report.json", canonical_json(report | entries))
    useless = [
        url for url, entry in entries.items()
        if entry["complete"] is not None and (not usable(entry["counts"]) or mostly_lost(entry))
    ]  # fmt: skip
    return Report(summary(entries, failures, run, config.allow_failed), useless)


def read_report(root: Store) -> Json:
    """Returns what earlier runs reported; empty if nothing readable exists."""
    try:
        report = parse_json(root.read("report.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def column_report(
    target: Target, heads: dict[int, int], failures: Sequence[tuple[ShardTask, str]] = ()
) -> Json:
    """Returns rows by status, bytes and seconds by stage, added up over the commits of a column,
    and its failed shards, each with the tar where this run knows it from `failures`.

    Rows of shards that have an index and no commit count as SHARD_FAILED or, where nobody has tried
    them, as not encoded; shards without an index as unread. Raises CountsDisagree.
    """
    store, layout = target.store, target.spec.layout
    column = describe(store, (target.spec, target.digest))
    column.refuse_damage()
    # a second job may have committed since the heads were read
    heads |= index_heads(store.parent, column.commits.keys() - heads.keys())
    seconds: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    uncounted = 0
    for shard, commit in column.commits.items():
        if (rows := heads.get(shard)) != commit.rows:
            raise CountsDisagree(
                f"{store.url}: shard {shard} has {commit.rows:,} rows, the source index says "
                f"{'nothing of it' if rows is None else f'{rows:,}'}. Restore the index, or run "
                "`python -m shards verify`"
            )
        seconds.update(commit.provenance.get("seconds", {}))
        suffixes.update(commit.provenance.get("passed_over", {}))
        gaps = any(status in MISSING for _, _, status in commit.not_ok)
        uncounted += gaps and "passed_over" not in commit.provenance
    counts = Counter(column.counts)
    for shard in heads.keys() - column.commits.keys():
        reason = Status.SHARD_FAILED.name.lower() if shard in column.failed else "not_encoded"
        counts[reason] += heads[shard]
    expected = sum(heads.values())
    if counts.total() != expected:
        raise CountsDisagree(
            f"{store.url}: {counts.total():,} rows are accounted for ({dict(counts)}), the "
            f"source index has {expected:,}. Run `python -m shards verify` on the column"
        )
    tars = {
        task.number: str(task.tar)
        for task, _ in failures
        if any(t.store.url == store.url for t in task.targets.values())
    }
    return {
        "rows": column.rows,
        "input_rows": expected,
        "reads": suffix_read(target.spec.identity),
        "counts": dict(sorted(counts.items())),
        "passed_over": dict(suffixes.most_common()),  # rows without the column's member, by others
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


def next_words(config: EncodeConfig) -> list[str]:
    """Returns the command that follows complete columns: training from the first ones of pictures and
    captions, or a look at the first one; nothing of a config without columns.
    """
    if not config.sources or not config.columns:
        return []
    kinds = {name: column.kind for name, column in config.columns.items()}
    latents = [name for name, kind in kinds.items() if kind in ("moments", "latents")]
    texts = [name for name, kind in kinds.items() if kind in ("tokens", "ids")]
    folder = f"{config.root.rstrip('/')}/{next(iter(config.sources))}"
    if not latents or not texts:
        return ["shards", "info", f"{folder}/{next(iter(kinds))}"]
    columns = ["--latents", f"{folder}/{latents[0]}", "--text", f"{folder}/{texts[0]}"]
    # the default is not overwritten
    out = ["--out", f"train-{latents[0]}.yaml"] if Path("train.yaml").exists() else []
    return ["train", "init", *columns, *out]


# The text -----------------------------------------------------------------------------------------


def summary(
    columns: Mapping[str, Json], failures: Sequence[tuple[ShardTask, str]], run: Json | None,
    allow_failed: bool = False,
) -> str:  # fmt: skip
    """Returns the end of a run for a reader: rows by column, time by stage, failures, what to do."""
    parts: list[Any] = [_line(url, entry, allow_failed) for url, entry in columns.items()]
    for url, entry in columns.items():
        if lost(entry):
            parts.append(f"WARNING {url}: {_lost_line(entry)}")
    if run is not None:  # of columns that were there already, `status` and report.json say more
        parts += [_rows_table(columns), _stage_table(columns), _run_line(run)]
    parts += [f"FAILED {task.name} ({task.tar}): {reason}" for task, reason in failures[:SHOWN]]
    if len(failures) > SHOWN:
        parts.append(f"... and {len(failures) - SHOWN} more; report.json has all")
    if failures:
        parts.append(
            "Mend or fetch the tars again, then: python -m encode retry-failed CONFIG"
            + ". To complete the columns without them: python -m encode run CONFIG allow_failed=true"
            * (not allow_failed)
        )
    return render(*parts, width=WIDTH)


def _lost_line(entry: Json) -> str:
    """Returns how many rows lack what a column reads, what they have instead, and how to read that."""
    captions, total = entry["counts"].get("caption_missing", 0), sum(entry["counts"].values())
    what, key, usual = ("caption", "caption", "txt") if captions else ("picture", "image", "jpg")
    reads = (entry["reads"] or usual).split(OR)  # columns of old may not say
    have, they_have = ("has", "It has") if lost(entry) == 1 else ("have", "They have")
    line = f"{lost(entry):,} of {total:,} rows {have} no {what} ({', '.join(reads)})"
    if not entry["passed_over"]:
        return f"{line}, nor anything in its place"
    suffixes = ", ".join(f"{s!r} of {counted(n, 'row')}" for s, n in entry["passed_over"].items())
    older = entry["passed_over_unknown"]
    more = f" (without {counted(older, 'older shard')})" if older else ""
    names = ", ".join(dict.fromkeys([*reads, next(iter(entry["passed_over"]))]))
    return (
        f"{line}. {they_have} {suffixes}{more}. A new column may read these, too: {key}: [{names}]"
    )


def _line(url: str, entry: Json, allow_failed: bool) -> str:
    if "damaged" in entry:
        return f"NOT complete, DAMAGED: {entry['damaged']}"
    counts = ", ".join(f"{entry['counts'][name]:,} {name}" for name in _ordered(entry["counts"]))
    if entry["complete"] is not None and (allow_failed or not entry["missing"]):
        useless = "but MOST ROWS ARE LOST, " if mostly_lost(entry) else ""
        useless = useless if usable(entry["counts"]) else "but NO ROW IS USABLE, "
        return f"{url}: complete, {useless}{counted(entry['rows'], 'row')}: {counts}"
    failures = len(entry["failed"])
    fresh = entry["missing"] - failures
    note = f", {fresh} not encoded yet" if fresh > 0 else ""
    return f"{url}: NOT complete, {counted(failures, 'shard')} failed{note}; {counts}"


def _ordered(names: Iterable[str]) -> list[str]:
    """Returns statuses in the order of their numbers; what is no status last."""
    order = [status.name.lower() for status in Status]
    return sorted(set(names), key=lambda name: order.index(name) if name in order else len(order))


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Returns a table with a row for each column, since there may be many; headings may wrap."""
    table = Table("column", *(name.replace("_", " ") for name in names), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for url, cells in rows.items():
        table.add_row(_column(url), *cells)
    return table


def _rows_table(columns: Mapping[str, Json]) -> Table:
    """Returns every input row of each column, as ok or by reason; the sums have been checked."""
    reasons = _ordered(name for entry in columns.values() for name in entry["counts"])
    unread = ["tars not read"] if any(entry["unread"] for entry in columns.values()) else []
    rows = {}
    for url, entry in columns.items():
        counts = [entry["counts"].get(reason, 0) for reason in reasons]
        counts += [entry["input_rows"], *(entry["unread"] for _ in unread)]
        rows[url] = [*(f"{n:,}" for n in counts), size_text(entry["bytes"])]
    return _table("what became of the input rows", [*reasons, "input", *unread, "bytes"], rows)


def _stage_table(columns: Mapping[str, Json]) -> Table:
    """Returns seconds by stage over all commits, with milliseconds a row. A commit calls the time
    of its column's encoder by the column's name.
    """
    stages_of = {
        url: {
            "encode" if stage == _column(url).split("/")[-1] else stage: seconds
            for stage, seconds in entry["seconds"].items()
        }
        for url, entry in columns.items()
    }
    names = {stage for seconds in stages_of.values() for stage in seconds}
    stages = [stage for stage in STAGES if stage in names] + sorted(names.difference(STAGES))
    rows = {
        url: [
            f"{seconds[s]:,.1f}  {1e3 * seconds[s] / max(columns[url]['rows'], 1):.2f}"
            if s in seconds
            else ""
            for s in stages
        ]
        for url, seconds in stages_of.items()
    }
    return _table("seconds, and ms a row", stages, rows)


def _column(url: str) -> str:
    """Returns the last two parts of a column's url: source and name."""
    return "/".join(url.rstrip("/").split("/")[-2:])


def _run_line(run: Json) -> str:
    line = f"this run: {counted(run.get('rows', 0), 'row')}"
    if run.get("rows_per_s") is not None:
        line += f"; {run['rows_per_s']:,.1f} samples/s"
    if run.get("busy") is not None:
        line += f"; encoders busy {100 * run['busy']:.0f} %"
    waits = run.get("waits", {})
    long = [f"{v:,.1f} s for {k}" for k, v in waits.items() if v > 0.01 * sum(waits.values())]
    return line + ("; waited " + ", ".join(long) if long else "")
