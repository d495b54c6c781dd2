"""report.json and the summary: every row of every tar is accounted for, or it is said that it is not."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encode.config import EncodeConfig
from encode.registry import VAES
from encode.report.report import CountsDisagree, column_report, summary, write_report
from encode.source.index import index_heads
from encode.tasks import ShardTask, Target
from shards import (
    ColumnSpec,
    CorruptColumn,
    IndexRow,
    Layout,
    Norm,
    ShardWriter,
    Source,
    Status,
    create_column,
    open_store,
    put_complete,
    put_index,
    seal,
)
from shards.column.commits import commit_name, failure_name
from shards.console import size_text
from shards.format.layout import FAILURE, VERSION
from shards.store.local import LocalStore

OK, BAD, NONE = Status.OK, Status.IMAGE_UNDECODABLE, Status.IMAGE_MISSING
TARS = ([OK, OK, BAD], [OK, NONE], [OK] * 4)


def config_of(folder: Path) -> EncodeConfig:
    return EncodeConfig.model_validate(
        {"root": str(folder), "sources": {"toy": "x.tar"}, "columns": {}, "shard_rows": 1024}
    )


def make(
    folder: Path, name: str = "vae", shards: int = 3, index_only: tuple[int, ...] = ()
) -> Target:
    """A column of tiny moments whose shard s has the statuses TARS[s]."""
    source = Source("toy", tuple((f"{s}.tar", 1_000) for s in range(shards)), 1024)
    root = open_store(folder / "toy")
    source.put(root)
    spec = ColumnSpec(
        {"name": name}, Layout("moments", (4, 2, 2), shards, 1024), Norm((0.0,), (1.0,))
    )
    column = Target(root.child(name), create_column(root.child(name), spec), spec)
    for shard, statuses in enumerate(TARS):
        rows = [IndexRow(f"{shard}-{i}", {"jpg": (512, 9)}, {}) for i in range(len(statuses))]
        index = put_index(root, source.fingerprint, shard, rows, None)
        if shard in index_only:
            continue
        with ShardWriter(
            column.store, spec, column.digest, shard, len(rows), index.digest
        ) as writer:
            writer.put_block(
                np.ones((len(rows), 4, 2, 2), np.float16), np.array(statuses, np.uint8)
            )
            writer.commit({"seconds": {"scan": 0.5, "decode": 1.25}})
    return column


def fail(column: Target, shard: int) -> None:
    record = {"format": FAILURE, "version": VERSION, "shard": shard, "reason": "BadTar: no tar"}
    column.store.replace(failure_name(shard), seal(record))


def test_every_row_is_ok_or_has_a_reason(tmp_path: Path) -> None:
    column = make(tmp_path)
    put_complete(column.store, column.digest, 3, False)
    run = {
        "rows": 9, "rows_per_s": 4.5, "busy": 0.93, "waits": {"decode": 2.0, "idle": 0.0},
        "columns": {column.store.url: {"rows": 9}}, "workers": [], "pid": 7,
    }  # fmt: skip
    root = open_store(tmp_path)
    text = write_report(root, {column.store.url: column}, [], run, config_of(tmp_path)).text
    entry = json.loads((tmp_path / "report.json").read_text())[column.store.url]
    assert entry["counts"] == {"image_missing": 1, "image_undecodable": 1, "ok": 7}
    assert entry["input_rows"] == entry["rows"] == 9
    assert (entry["committed"], entry["missing"], entry["unread"]) == (3, 0, 0)
    assert entry["seconds"] == {"decode": 3.75, "scan": 1.5}
    assert entry["run"] == {
        "rows": 9, "rows_per_s": 4.5, "busy": 0.93, "waits": run["waits"], "column": {"rows": 9},
    }  # fmt: skip
    assert entry["failed"] == []
    files = [p for p in (tmp_path / "toy/vae").rglob("c/**/*") if p.is_file()]
    assert entry["bytes"] == sum(p.stat().st_size for p in files)
    assert (
        f"{column.store.url}: complete, 9 rows: 7 ok, 1 image_undecodable, 1 image_missing" in text
    )
    assert "encoders busy 93 %" in text
    assert "waited 2.0 s for decode" in text
    assert "4.5 samples/s" in text
    write_report(root, {column.store.url: column}, [], None, config_of(tmp_path))  # nothing to do
    assert json.loads((tmp_path / "report.json").read_text())[column.store.url] == entry


def test_tables_of_many_columns_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    column = make(tmp_path)
    entry = column_report(column, index_heads(open_store(tmp_path / "toy")))
    names = [f"blip3o-long/{vae}-{size}" for vae in VAES for size in (256, 512)]
    entry |= {"failed": [], "seconds": {**entry["seconds"], "flux-256": 4.5}}
    text = summary({f"s3://bucket/cache/{name}": entry for name in names}, [], {"rows": 9})
    assert "…" not in text
    lines = [line for line in text.splitlines() if "blip3o-long/flux-256 " in line]
    size = size_text(entry["bytes"]).split()[0]
    assert [re.findall(r"[\d.]+", line.split("256", 1)[1]) for line in lines] == [
        ["7", "1", "1", "9", size], ["3.8", "416.67", "4.5", "500.00", "1.5", "166.67"]
    ]  # fmt: skip
    assert re.search(r"column +┃ +decode ┃ +encode ┃", text)


def test_shards_that_failed_count_too(tmp_path: Path) -> None:
    column = make(tmp_path, shards=4, index_only=(1,))  # the fourth tar was never read
    fail(column, 1)
    fail(column, 3)
    root, url = open_store(tmp_path), column.store.url
    task = ShardTask("toy", "f", root, "/data/1.tar", 1_000, 1, 1024, {"vae": column})
    failed = [(task, "BadTar: no tar")] * 25
    text = write_report(root, {url: column}, failed, None, config_of(tmp_path)).text
    entry = json.loads((tmp_path / "report.json").read_text())[url]
    assert entry["counts"] == {"image_undecodable": 1, "ok": 6, "shard_failed": 2}
    assert (entry["rows"], entry["input_rows"]) == (7, 9)
    assert (entry["committed"], entry["missing"], entry["unread"]) == (2, 2, 1)
    assert entry["complete"] is None
    assert entry["failed"] == [
        {"shard": 1, "reason": "BadTar: no tar", "tar": "/data/1.tar"},
        {"shard": 3, "reason": "BadTar: no tar"},
    ]
    assert f"{url}: NOT complete, 2 shards failed; 6 ok" in text
    assert "FAILED toy/00001 (/data/1.tar): BadTar: no tar" in text
    assert "... and 5 more" in text
    assert "retry-failed" in text
    (tmp_path / "toy/vae" / failure_name(1)).unlink()
    assert column_report(column, index_heads(root.child("toy")))["counts"]["not_encoded"] == 2


def test_columns_of_earlier_runs_stay(tmp_path: Path) -> None:
    root = open_store(tmp_path)
    for name in ("one", "two"):
        column = make(tmp_path, name)
        write_report(root, {column.store.url: column}, [], None, config_of(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [Path(url).name for url in sorted(report)] == ["one", "two"]
    (tmp_path / "report.json").write_text("{not JSON")
    write_report(root, {column.store.url: column}, [], None, config_of(tmp_path))
    assert len(json.loads((tmp_path / "report.json").read_text())) == 1


@pytest.mark.parametrize("shard", [0, 2])
def test_rows_that_do_not_add_up_are_said(tmp_path: Path, shard: int) -> None:
    """An index that says another number of rows than the commit: nothing is written."""
    column = make(tmp_path)
    path = tmp_path / f"toy/index/{shard:05d}.jsonl"
    head, *lines = path.read_text().splitlines(keepends=True)
    changed = json.loads(head) | {"rows": len(lines) - 1}
    path.write_text(json.dumps(changed) + "\n" + "".join(lines[:-1]))
    with pytest.raises(CountsDisagree, match=f"shard {shard} has {len(lines)} rows, the source"):
        write_report(
            open_store(tmp_path), {column.store.url: column}, [], None, config_of(tmp_path)
        )
    assert not (tmp_path / "report.json").exists()


def test_a_shard_that_another_job_committed_meanwhile(tmp_path: Path) -> None:
    """Its index was not there when the heads were read; it is looked up then."""
    column = make(tmp_path)
    heads: dict[int, int] = {0: 3}
    assert column_report(column, heads)["input_rows"] == 9
    (tmp_path / "toy/index/00001.jsonl").unlink()
    with pytest.raises(CountsDisagree, match="nothing of it"):
        column_report(column, {0: 3, 2: 4})


def test_a_commit_of_another_column_is_not_counted(tmp_path: Path) -> None:
    column = make(tmp_path)
    other: Any = replace(column, digest="0" * 64)
    with pytest.raises(ValueError, match="belongs to another column.json"):
        column_report(other, index_heads(column.store.parent))
    assert column.store.size(commit_name(0))


def test_heads_of_indexes_that_come_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As reads of a network's file system may: an index is not damaged for that."""
    column = make(tmp_path)
    folder = column.store.parent

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(handle, [buffers[0][: -(-len(buffers[0]) // 2)]], offset)

    monkeypatch.setattr(LocalStore, "preadv", staticmethod(short))
    assert index_heads(folder) == {0: 3, 1: 2, 2: 4}


@pytest.mark.parametrize("line", [b"[" * 100_000, b"{}", b"[]", b"7", b"\xff", b""])
def test_the_head_of_a_damaged_index(tmp_path: Path, line: bytes) -> None:
    put_index(tmp_path, "0" * 64, 1, [], None)
    (tmp_path / "index/00001.jsonl").write_bytes(line + b"\n")
    with pytest.raises(CorruptColumn, match=r"00001\.jsonl: damaged index"):
        index_heads(open_store(tmp_path))
