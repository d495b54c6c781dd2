"""The format as others see it: zarr-python alone, and records byte by byte."""

import json
import pickle
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from shards import Column, Layout, Status
from shards.format.layout import differences
from tests.shards.toy import (
    EMPTY,
    ROWS,
    SHAPE,
    SHARD_ROWS,
    TOKENS,
    caption_status,
    image_status,
    length_of,
    moments_of,
    row_ids,
    tokens_of,
)


def group(path: Path) -> Any:
    return zarr.open(str(path), mode="r")


def test_zarr_alone_reads_the_moments(toy: Path) -> None:
    moments = group(toy / "vae")["moments"]
    assert moments.shape == (3 * SHARD_ROWS, *SHAPE)
    assert moments.dtype == np.float16
    for shard in range(3):
        ids = row_ids(shard)
        expected = moments_of(ids)
        expected[image_status(ids) == Status.IMAGE_UNDECODABLE] = np.nan
        np.testing.assert_array_equal(moments[ids[0] : ids[-1] + 1], expected)
        after = moments[ids[-1] + 1 : (shard + 1) * SHARD_ROWS]
        assert len(after) == SHARD_ROWS - ROWS[shard]
        assert np.isnan(after).all()


def test_zarr_alone_reads_the_tokens_by_slot(toy: Path) -> None:
    column = group(toy / "text")
    lengths, tokens = column["lengths"][:], column["tokens"]
    assert tokens.attrs["torch_dtype"] == "bfloat16"
    for shard in range(3):
        slot = 0
        for row in row_ids(shard).tolist():
            if row % 1024 == 0:
                slot = row * TOKENS  # each 1,024 rows start at their own capacity
            gone = row % 53 == 7
            assert lengths[row] == (0 if gone else length_of(row))
            if row % 97 == 0 and not gone:
                np.testing.assert_array_equal(tokens[slot : slot + lengths[row]], tokens_of(row))
            slot += int(lengths[row])
        assert (lengths[row_ids(shard)[-1] + 1 : (shard + 1) * SHARD_ROWS] == 0).all()
    np.testing.assert_array_equal(column["empty"][:], EMPTY)


@pytest.mark.parametrize(("name", "status_of"), [("vae", image_status), ("text", caption_status)])
def test_status_of_every_row_and_of_none(toy: Path, name: str, status_of: Any) -> None:
    status = group(toy / name)["status"][:]
    expected = np.full(3 * SHARD_ROWS, 255)
    for shard in range(3):
        expected[row_ids(shard)] = status_of(row_ids(shard))
    np.testing.assert_array_equal(status, expected)


def test_crc_is_crc32c_of_the_values(toy: Path) -> None:
    crc, text = group(toy / "vae")["crc"][:], group(toy / "text")["crc"][:]
    moments = group(toy / "vae")["moments"]
    for row in [0, 5, 3, 1023, 1024, 1099, SHARD_ROWS, 2 * SHARD_ROWS + 1023]:
        assert crc[row] == google_crc32c.value(moments[row].tobytes())
        gone = row % 53 == 7
        assert text[row] == google_crc32c.value(b"" if gone else tokens_of(row).tobytes())
    assert crc[1100] == text[1100] == 0


def test_our_reader_and_zarr_agree_in_any_order(toy: Path) -> None:
    rows = np.random.default_rng(0).permutation(np.concatenate([row_ids(s) for s in range(3)]))
    column = Column.open(toy / "vae")
    np.testing.assert_array_equal(
        column.read(rows, check=True), group(toy / "vae")["moments"][:][rows]
    )
    text = Column.open(toy / "text")
    present = [tokens_of(r) for r in rows.tolist() if r % 53 != 7]
    np.testing.assert_array_equal(text.read(rows, check=True), np.concatenate(present))
    np.testing.assert_array_equal(text.status(rows), caption_status(rows))


def test_a_copy_by_pickle_opens_its_own_files(toy: Path) -> None:
    column = Column.open(toy / "vae")
    rows = np.array([7, 1099])
    copy = pickle.loads(pickle.dumps(column))
    column.close()
    np.testing.assert_array_equal(copy.read(rows), moments_of(rows))


def test_records_are_canonical_and_small(toy: Path) -> None:
    for path in [*(toy / "vae").rglob("*.json")]:
        data = path.read_bytes()
        again = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"))
        assert again.encode() + b"\n" == data
    record = json.loads((toy / "vae/commits/00000.json").read_bytes())
    ids = row_ids(0)
    gone = [[i, 1, int(s)] for i, s in enumerate(image_status(ids).tolist()) if s]
    assert record["not_ok"] == gone
    assert record["rows"] == 1100
    assert [o[0] for o in record["objects"]] == [
        "moments/c/0/0/0/0", "moments/c/1/0/0/0", "status/c/0", "crc/c/0"
    ]  # fmt: skip


def test_shard_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 1024"):
        Layout("moments", SHAPE, 1, 1000)


def test_differences_name_nested_fields() -> None:
    actual = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert differences(actual, {"a": {"b": 1, "c": [2]}, "e": 3}) == [
        "a.c: found [1], expected [2]",
        "d: found 2, expected None",
        "e: found None, expected 3",
    ]
