"""`diff` says in what two columns differ, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards import Column, ShardWriter, Status, create_column, put_complete, put_empty
from shards.format.int8 import to_floats
from shards.tools.convert import convert
from shards.tools.diff import Difference, diff, lines_of
from tests.shards.tools.test_transfer import normal_tokens
from tests.shards.toy import (
    EMPTY,
    ROWS,
    Counted,
    caption_status,
    image_status,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
    write_column,
    write_shard,
)


def printed(difference: Difference) -> str:
    return "\n".join(lines_of(difference, "a", "b"))


@pytest.mark.parametrize("way", [{"backend": "webdataset"}, {"codec": "blosc"}])
def test_storage_is_no_difference(toy: Path, tmp_path: Path, way: dict[str, str]) -> None:
    for name in ("vae", "text"):
        convert(toy / name, tmp_path / name, **way)  # type: ignore[arg-type]
        progress = Counted()
        difference = diff(toy / name, tmp_path / name, progress=progress)
        assert not difference
        assert not progress.counts, "equal digests: nothing is read"
        assert [line.split(":")[0] for line in difference.stored] == [f"layout.{next(iter(way))}"]
        assert "the same content" in printed(difference)


def test_values_by_shard_and_row(tmp_path: Path) -> None:
    a, spec = write_column(tmp_path / "a", moments_spec()), moments_spec(backend="webdataset")
    b = tmp_path / "b"
    digest = create_column(b, spec)
    changed = [905, 7]  # of shard 2
    for shard in range(3):
        ids = row_ids(shard)
        with ShardWriter(b, spec, digest, shard, len(ids), f"index {shard}") as writer:
            for first in range(0, len(ids), 1024):
                block = ids[first : first + 1024]
                values = moments_of(block)
                if shard == 2:
                    values[changed, 1, 0, 0] += np.float16(0.5)
                writer.put_block(values, image_status(block))
            writer.commit({})
    put_complete(b, digest, 3, allow_failed=False)
    difference = diff(a, b)
    assert [(s.shard, s.rows) for s in difference.shards] == [(2, sorted(changed))]
    assert difference.shards[0].largest == 0.5
    changed = Column.open(b).read(np.array(changed) + 2 * 2048).astype(float)
    assert difference.relative == pytest.approx(np.sqrt(2 * 0.25) / np.linalg.norm(changed))
    assert "shard 2: 2 rows of other values, [7, 905]" in printed(difference)
    assert "by at most 0.5" in printed(difference)


def test_identity_rows_statuses_lengths(tmp_path: Path) -> None:
    a = write_column(tmp_path / "a", tokens_spec())
    spec = tokens_spec(source="another")
    b = tmp_path / "b"
    digest = create_column(b, spec)
    put_empty(b, spec, EMPTY + 1)
    rows = 30, 40
    for shard, count in enumerate(rows):
        ids = row_ids(shard, rows)
        captions = [tokens_of(int(i)) for i in ids]
        status = caption_status(ids)
        if shard == 1:
            captions[3] = captions[3][:0]
            status[6] = Status.CAPTION_UNDECODABLE
        with ShardWriter(b, spec, digest, shard, count, f"index {shard}") as writer:
            writer.put_block(captions, status)
            writer.commit({})
    text = printed(diff(a, b))
    assert "identity.source: found 'fingerprint of toy', expected 'another'" in text
    assert "empty caption: other tokens" in text
    assert "shard 0: 1100 rows and 30\n" in text + "\n"
    assert "shard 1: 1 row of other status, [6] first: ok and caption_undecodable; " in text
    assert "; 1 row of other length, [3]" in text
    assert f"shard 2: committed in {a} only" in text
    assert text.count("\n") < 10


def test_int8_beside_bfloat16(tmp_path: Path) -> None:
    a = normal_tokens(tmp_path / "a")
    b = convert(a, tmp_path / "b", element="int8")
    difference = diff(a, tmp_path / "b")
    assert difference
    rows = np.arange(100)
    exact = to_floats(Column.open(a).read(rows))
    rounded = to_floats(b.decoded(b.read(rows)))
    assert difference.shards[0].largest == np.abs(exact - rounded).max()
    assert difference.relative == pytest.approx(
        np.linalg.norm(exact - rounded) / np.linalg.norm(rounded), rel=1e-5
    )
    text = printed(difference)
    assert "layout.element: found 'bfloat16', expected 'int8'" in text
    assert "quantisation" in text
    assert all(len(line) <= 300 for line in text.splitlines()), "not every channel's scale"
    assert not diff(tmp_path / "b", tmp_path / "b")


def test_columns_of_other_shapes_are_not_read(tmp_path: Path) -> None:
    a, b = write_column(tmp_path / "a", moments_spec()), write_column(tmp_path / "b", tokens_spec())
    text = printed(diff(a, b))
    assert "layout.kind: found 'moments', expected 'tokens'" in text
    assert "rows cannot be compared" in text


def test_much_that_differs_is_told_in_few_lines(tmp_path: Path) -> None:
    spec = moments_spec(24)
    a = write_column(tmp_path / "a", spec, (300,) * 24)
    b = write_column(tmp_path / "b", spec, (300,) * 24, shift=0.5)
    difference = diff(a, b, processes=2)
    assert len(difference.shards) == 24
    text = printed(difference)
    assert len(text.splitlines()) < 20
    assert max(map(len, text.splitlines())) < 300
    assert "... and 14 more shards" in text
    valid = sum(int((image_status(row_ids(s, (300,) * 24)) <= 1).sum()) for s in range(24))
    assert f"{valid:,} rows differ" in text


def test_an_unfinished_column(tmp_path: Path) -> None:
    a, spec = write_column(tmp_path / "a", moments_spec()), moments_spec()
    digest = create_column(tmp_path / "b", spec)
    for shard in range(len(ROWS)):
        difference = diff(a, tmp_path / "b")
        assert [s.shard for s in difference.shards] == list(range(shard, 3))
        write_shard(tmp_path / "b", spec, digest, shard)
    assert not diff(a, tmp_path / "b")
