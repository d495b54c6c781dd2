"""What `status` says of columns that are begun, complete or failed, and of a run from its progress file."""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import pytest
import yaml

from encode.report.status import (
    RunRecord,
    add_options,
    column_status,
    in_words,
    is_alive,
    run_status,
    status,
    waiting_for,
)
from shards import open_store, put_complete
from shards.column.commits import Commit, commit_name
from shards.format.atomic import canonical_json, seal
from shards.tools.faults import objects_of
from tests.commands.lines import next_lines
from tests.encode.report.test_report import config_of, fail, make

RUN = {
    "format": "latentbank-progress", "host": platform.node(), "started": 1e9,
    "shards": {"total": 10, "done": 4, "failed": 1, "running": 2}, "rows": 4_000,
    "rows_per_s": 123.45, "eta_s": 90_061.0, "busy": 0.41,
    "waits": {"decode": 60.0, "read": 30.0, "write": 10.0, "idle": 0.0}, "workers": [],
}  # fmt: skip


def run_of(**fields: object) -> RunRecord:
    return RunRecord.model_validate(RUN | fields)


def words_of(config: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([str(config), *options])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    columns = {
        n: {"kind": "moments", "encoder": "flux", "resolution": 32} for n in ("vae", "later")
    }
    path = tmp_path / "toy.yaml"
    path.write_text(
        yaml.safe_dump({"root": str(tmp_path), "sources": {"toy": "x.tar"}, "columns": columns})
    )
    return path


def test_a_column_from_nothing_to_complete(tmp_path: Path) -> None:
    store = open_store(tmp_path / "toy/vae")
    assert column_status(store) == {
        "begun": False, "shards": None, "committed": 0, "failed": {}, "complete": None,
    }  # fmt: skip
    column = make(tmp_path, shards=4, index_only=(1,))
    fail(column, 1)
    record = column_status(store)
    assert (record["shards"], record["committed"], record["missing"]) == (4, 2, 1)
    assert record["failed"] == {1: "BadTar: no tar"}
    assert record["counts"] == {"ok": 6, "image_undecodable": 1}
    assert record["rows"] == 7
    values = [p for p in (tmp_path / "toy/vae").rglob("c/**/*") if p.is_file()]
    assert record["bytes"] == sum(p.stat().st_size for p in values)

    fail(column, 3)
    snapshot = put_complete(store, column.digest, 4, True)
    record = column_status(store)
    assert record["complete"] == snapshot.digest
    assert record["counts"] == {"ok": 6, "image_undecodable": 1}
    (tmp_path / "toy/vae" / commit_name(0)).write_text("torn")
    assert column_status(store)["damaged"] == 1
    reported = {"complete": snapshot.digest, "bytes": 12_345}  # then no commit is read
    assert column_status(store, reported)["bytes"] == 12_345
    assert column_status(store, reported)["rows"] == 7


def test_the_command(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_status(words_of(config)) == 0
    text = capsys.readouterr().out
    assert "not begun" in text
    assert next_lines(text) == [f"next: python -m encode run {config}"]
    fail(make(tmp_path, index_only=(1,)), 1)
    record = RUN | {"pid": os.getpid(), "updated": time.time()}
    (tmp_path / "progress.json").write_bytes(canonical_json(record))
    assert run_status(words_of(config)) == 3
    text = capsys.readouterr().out
    assert "toy/vae" in text
    assert "2 of 3" in text
    assert "FAILED toy/vae/00001: BadTar: no tar" in text
    assert f"retry-failed {config}" in text
    assert not next_lines(text)  # a run is at work, and says what follows
    assert "running: process" in text
    assert "1 d 01:01:01" in text
    assert "decode-bound: raise engine.threads" in text

    assert run_status(words_of(config, "--json")) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["run"]["alive"]
    assert result["columns"]["toy/vae"]["failed"] == {"1": "BadTar: no tar"}

    (tmp_path / "progress.json").write_bytes(canonical_json(record | {"updated": 1e9}))
    assert run_status(words_of(config, "--watch")) == 3  # a run that is over is not waited for
    assert "not running any more" in capsys.readouterr().out


def test_whether_a_run_is_alive() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    now = time.time()

    def alive(**fields: object) -> bool:
        return is_alive(run_of(**{"pid": os.getpid(), "updated": now, **fields}), now)

    assert alive()
    assert not alive(pid=child)
    assert not alive(updated=now - 3_600)
    assert alive(pid=child, host="another", updated=now - 9)
    assert not alive(pid=child, host="another", updated=now - 3_600)


def test_a_run_in_words() -> None:
    now = 1e9 + 7
    record = run_of(pid=7, updated=1e9)
    text = "\n".join(in_words(record, True, now))
    assert "4 of 10 done in this run, 1 failed, 2 in flight" in text
    assert "123.5 samples/s" in text
    assert "41 % busy; decode-bound" in text
    assert "(60 % of the waiting)" in text
    done = run_of(pid=7, updated=1e9, shards={"total": 10, "done": 9, "failed": 1})
    assert "ended" in in_words(done, False, now)[0]
    assert "ETA" not in "\n".join(in_words(done, False, now))
    assert "as it should be" in waiting_for(run_of(busy=0.97))
    for reason in ("read", "write", "idle"):
        waits = {reason: 5.0, "decode": 1.0}
        assert "of the waiting" in waiting_for(run_of(busy=0.1, waits=waits))


@pytest.mark.parametrize("text", ["", "{torn", "[]", '{"format": "another"}'])
def test_a_progress_file_of_somebody_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert status(config_of(tmp_path))["run"] is None


def test_many_shards(tmp_path: Path) -> None:
    """They are told from one listing, and each commit is read once."""
    column = make(tmp_path, shards=1_000)
    record = json.loads((tmp_path / "toy/vae" / commit_name(0)).read_bytes())
    for shard in range(3, 1_000):
        names = sorted(objects_of(column.spec, shard, record["rows"])[0])
        commit = Commit(
            shard, record["rows"], (), tuple((name, 9, "0" * 64) for name in names),
            tuple(record["blocks"]), record["index"], record["column"], record["provenance"],
        )  # fmt: skip
        (tmp_path / "toy/vae" / commit_name(shard)).write_bytes(seal(commit.record()))
    result = column_status(column.store)
    assert result["committed"] == 1_000
    assert result["rows"] == 9 + 997 * 3
