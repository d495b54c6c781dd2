"""The arithmetic of bytes against what the writer writes, for every kind and backend."""

from pathlib import Path

import numpy as np
import pytest

from encode.plan.sizes import alternatives, column_bytes, shard_bytes
from shards import ColumnSpec, Layout, ShardWriter, create_column, put_empty

ROWS = 1_500
CASES = {
    "moments": Layout("moments", (8, 4, 4), 2, 2048),
    "moments, webdataset": Layout("moments", (8, 4, 4), 2, 2048, backend="webdataset"),
    "features, bfloat16": Layout("features", (5, 24), 2, 2048, "bfloat16"),
    "tokens": Layout("tokens", (24, 16), 2, 2048),
    "tokens, int8": Layout("tokens", (24, 16), 2, 2048, "int8"),
    "tokens, webdataset": Layout("tokens", (24, 16), 2, 2048, backend="webdataset"),
    "ids": Layout("ids", (24,), 2, 2048),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_are_written(tmp_path: Path, name: str) -> None:
    layout = CASES[name]
    chance = np.random.default_rng(0)
    status = np.where(chance.random(ROWS) < 0.02, 3, 0).astype(np.uint8)
    lengths = np.where(status == 0, chance.integers(0, 25, ROWS), 0)
    if layout.ragged:
        values = [np.ones((n, *layout.unit_shape), layout.dtype) for n in lengths]
    else:
        values = [np.ones(layout.unit_shape, layout.dtype)] * ROWS
    scales = {"scheme": "s", "channel": [1.2345678901] * 16, "relative_error": 0.001, "rows": 256}
    spec = ColumnSpec(
        {"encoder": {"class": "Any", "path": "/some/where", "weights": "0" * 64}}, layout,
        empty_tokens=2 if layout.ragged else None, quantisation=scales if layout.quantised else None,
    )  # fmt: skip
    digest = create_column(tmp_path, spec)
    if layout.ragged:
        words = spec.arrays()["empty"]
        put_empty(tmp_path, spec, np.zeros(words.shape, words.dtype))
    fixed = bytes_below(tmp_path)
    with ShardWriter(tmp_path, spec, digest, 1, ROWS, "0" * 64) as writer:
        for start in range(0, ROWS, 1024):
            block = values[start : start + 1024]
            writer.put_block(
                block if layout.ragged else np.stack(block), status[start : start + 1024]
            )
        writer.commit({"host": "h", "versions": {"torch": "2.9.1", "numpy": "2.3.4"}})
    size = bytes_below(tmp_path) - fixed
    planned = shard_bytes(layout, status == 0, lengths)
    assert planned == pytest.approx(size, abs=400)  # of the commit's provenance
    assert column_bytes(layout, 0, 2) == pytest.approx(fixed + 630, abs=600)  # with COMPLETE


def test_a_shard_without_rows_or_values(tmp_path: Path) -> None:
    none = np.zeros(0, bool)
    assert 0 < shard_bytes(CASES["tokens"], none, np.zeros(0, np.int64)) < 1_500
    nothing = shard_bytes(CASES["tokens"], np.zeros(9, bool), np.zeros(9, np.int64))
    assert nothing < shard_bytes(CASES["tokens"], np.ones(9, bool), np.ones(9, np.int64))


def test_a_codec_shrinks_the_values_alone() -> None:
    layout = Layout("moments", (8, 4, 4), 2, 2048, codec="blosc")
    present, lengths = np.ones(1024, bool), np.zeros(1024, np.int64)
    whole, half = (shard_bytes(layout, present, lengths, ratio) for ratio in (1.0, 0.5))
    assert whole - half == 1024 * 8 * 4 * 4 * 2 // 2


def test_int8_is_half_and_ids_next_to_nothing() -> None:
    layout = Layout("tokens", (256, 2048), 100, 8192)
    present, lengths = np.ones(8000, bool), np.full(8000, 121)
    sizes = {n: shard_bytes(a, present, lengths) for n, a in alternatives(layout).items()}
    whole = shard_bytes(layout, present, lengths)
    assert whole == pytest.approx(8000 * 121 * 4096, rel=0.002)
    assert sizes["int8"] / whole == pytest.approx(0.5, abs=0.002)
    assert sizes["ids"] / whole == pytest.approx(4 / 4096, rel=0.1)
    assert alternatives(CASES["moments"]) == {}
    assert list(alternatives(CASES["tokens, int8"])) == ["ids"]


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
