"""Masks of rows: from keys, scores and row ids, joined with columns, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import (
    BadRows,
    ColumnSpec,
    IndexRow,
    JoinedColumns,
    Source,
    SourceMismatch,
    Status,
    open_join,
    open_sources,
    put_complete,
    put_index,
)
from shards.column.mask import read_mask
from shards.column.writer import ShardWriter, create_column, put_empty
from shards.errors import BadMask
from shards.format.layout import ZARR_ROWS
from shards.tools.mask import make_mask
from tests.shards.tools.test_commands import command
from tests.shards.toy import (
    EMPTY,
    SHARD_ROWS,
    caption_status,
    image_status,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
)

ROWS = (1100, 40, 64)
TARS = ("a.tar", "b.tar", "c.tar")
ALL = np.concatenate([row_ids(shard, ROWS) for shard in range(3)])
VALID = ALL[(image_status(ALL) == Status.OK) & (caption_status(ALL) == Status.OK)]


def key_of(shard: int, row: int) -> str:
    return "again" if row == 3 and shard < 2 else f"folder/{shard}-{row:04d}"


def write(path: Path, spec: ColumnSpec, index: list[str]) -> None:
    digest = create_column(path, spec)
    if spec.layout.ragged:
        put_empty(path, spec, EMPTY)
    for shard, rows in enumerate(ROWS):
        with ShardWriter(path, spec, digest, shard, rows, index[shard]) as writer:
            for first in range(0, rows, ZARR_ROWS):
                ids = row_ids(shard, ROWS)[first : first + ZARR_ROWS]
                if spec.layout.ragged:
                    writer.put_block([tokens_of(int(i)) for i in ids], caption_status(ids))
                else:
                    writer.put_block(moments_of(ids), image_status(ids))
            writer.commit({})
    put_complete(path, digest, len(ROWS), allow_failed=False)


def write_source(folder: Path, sizes: int = 0) -> Path:
    """A source of three tars with the columns `vae` and `text`."""
    source = Source("toy", tuple((tar, 10_000 + sizes) for tar in TARS), SHARD_ROWS)
    source.put(folder)
    index = []
    for shard, rows in enumerate(ROWS):
        keys = [IndexRow(key_of(shard, row), {"jpg": (512, 10)}, {}) for row in range(rows)]
        index.append(put_index(folder, source.fingerprint, shard, keys, None).digest)
    write(folder / "vae", moments_spec(source=source.fingerprint), index)
    write(folder / "text", tokens_spec(source=source.fingerprint), index)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("masks") / "toy")


def joined(source: Path, *masks: Path, **how: Any) -> JoinedColumns:
    return open_join(source / "vae", source / "text", masks=masks, **how)


def kept(ids: np.ndarray[Any, Any]) -> list[int]:
    return VALID[np.isin(VALID, ids)].tolist()


WANTED = [*row_ids(0, ROWS)[5:500:3], *row_ids(2, ROWS)[::2]]


def lines_of(ids: list[Any]) -> list[tuple[str, str]]:
    """(tar, key) of row ids."""
    return [(TARS[i // SHARD_ROWS], key_of(i // SHARD_ROWS, i % SHARD_ROWS)) for i in ids]


def write_keys(path: Path, ids: list[Any]) -> Path:
    pairs = lines_of(ids)
    if path.suffix == ".csv":
        path.write_text("tar,score,key\n" + "".join(f"{tar},1,{key}\n" for tar, key in pairs))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"key": key}) + "\n" for _, key in pairs))
    elif path.stem == "bits":
        bits = np.zeros(3 * SHARD_ROWS, bool)
        bits[ids] = True
        np.save(path, bits)
    elif path.suffix == ".npy":
        np.save(path, np.array(ids[::-1], np.int32))
    else:
        path.write_text("\r\n".join(key for _, key in pairs))
    return path


@pytest.mark.parametrize("name", ["keys.txt", "keys.csv", "keys.jsonl", "bits.npy", "ids.npy"])
def test_any_list_of_rows_leaves_just_these(source: Path, tmp_path: Path, name: str) -> None:
    keys = write_keys(tmp_path / name, WANTED)
    result = command("mask", source / "vae", "--keys", keys, "--out", tmp_path / "mask")
    assert result.returncode == 0, result.stderr
    assert f"{len(WANTED)} of {sum(ROWS):,} rows are kept" in result.stdout
    join = joined(source, tmp_path / "mask")
    assert join.valid_rows.tolist() == kept(np.array(WANTED))
    # another file that names the same rows is the same mask for a run
    np.save(tmp_path / "other.npy", np.array(WANTED))
    same, _ = make_mask(source / "text", tmp_path / "other.npy")
    assert join.identity()["masks"] == [same.digest]
    assert "masks" not in joined(source).identity()


def test_drop_leaves_the_others(source: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.txt", WANTED)
    mask, _ = make_mask(source / "vae", keys, drop=True)
    mask.put(tmp_path / "mask")
    left = np.setdiff1d(ALL, WANTED)
    assert joined(source, tmp_path / "mask").valid_rows.tolist() == kept(left)
    assert mask.kept == len(left)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_by_their_scores(source: Path, tmp_path: Path, suffix: str) -> None:
    scores = np.random.default_rng(0).uniform(0, 10, len(ALL)).round(2)
    with (tmp_path / f"scores.{suffix}").open("w") as file:
        if suffix == "csv":
            file.write("key,tar,aesthetic\n")
        for (tar, key), score in zip(lines_of(ALL.tolist()), scores, strict=True):
            record = json.dumps({"key": key, "tar": tar, "aesthetic": score})
            file.write((f"{key},{tar},{score}" if suffix == "csv" else record) + "\n")
    words = ["--at-least", "aesthetic=5", "--at-most", "aesthetic=9"]
    file_name = tmp_path / f"scores.{suffix}"
    result = command("mask", source / "vae", "--keys", file_name, "--out", tmp_path / "m", *words)
    assert result.returncode == 0, result.stderr
    expected = ALL[(scores >= 5) & (scores <= 9)]
    assert joined(source, tmp_path / "m").valid_rows.tolist() == kept(expected)
    mask = read_mask(tmp_path / "m")
    assert mask.made["bounds"] == [["aesthetic", 5.0, None], ["aesthetic", None, 9.0]]
    assert mask.made["outside"] == len(ALL) - len(expected)


def test_several_masks_leave_what_all_of_them_name(source: Path, tmp_path: Path) -> None:
    for name, ids in (("a", ALL[::2]), ("b", ALL[::3])):
        np.save(tmp_path / "ids.npy", ids)
        make_mask(source / "vae", tmp_path / "ids.npy")[0].put(tmp_path / name)
    join = joined(source, tmp_path / "a", tmp_path / "b")
    assert join.valid_rows.tolist() == kept(ALL[::6])
    assert len(join.identity()["masks"]) == 2


def test_an_order_of_masked_rows_is_pure_and_whole(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ALL[ALL % 4 < 2])
    make_mask(source / "vae", tmp_path / "ids.npy")[0].put(tmp_path / "mask")
    join = joined(source, tmp_path / "mask")
    order, rows = join.order(seed=3, lanes=8), join.valid_rows
    epoch = order.epoch_samples
    seen = np.concatenate([order(position, 8)[1] for position in range(0, epoch, 8)])
    assert len(set(seen.tolist())) == epoch
    assert len(rows) - 8 < epoch <= len(rows)
    assert set(seen.tolist()) <= set(rows.tolist())
    ranks = [order(8 * 5, 16, 2, rank)[1] for rank in (0, 1)]
    assert np.array_equal(np.concatenate(ranks), order(8 * 5, 16)[1])
    again = joined(source, tmp_path / "mask").order(seed=3, lanes=8)
    assert np.array_equal(again(8 * 7, 8)[1], order(8 * 7, 8)[1])
    assert order.identity() != joined(source).order(seed=3, lanes=8).identity()


def test_keys_without_a_row_are_counted_and_said(source: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.txt", WANTED)
    keys.write_text(keys.read_text() + "\nnowhere\nnor/here\nnowhere\n")
    result = command("mask", source / "vae", "--keys", keys, "--out", tmp_path / "mask")
    assert result.returncode == 0, result.stderr
    assert "2 of the keys name no row: nowhere, nor/here" in result.stdout
    assert read_mask(tmp_path / "mask").made["unknown"] == 2


BAD = {
    "unknown.txt": ("nowhere\n", "none of its 1 keys is a key of"),
    "twice.txt": ("again\n", "name several rows each"),
    "tar.txt": ("other.tar\tagain\n", "found the tars other.tar"),
    "empty.txt": ("\n", "found no key"),
    "columns.csv": ("id,score\n1,2\n", "found the columns id, score"),
    "field.jsonl": ('{"id": 1}\n', "line 1: found no key"),
    "number.jsonl": ("17\n", "line 1: found no key"),
    "json.jsonl": ('{"key"\n', "line 1: no JSON"),
    "bytes.txt": (b"\xff\xfe", "not a text in UTF-8"),
    "short.npy": (np.ones(7, bool), "found 7 bools, expected 6,144"),
    "floats.npy": (np.ones(7), "found float64 of shape"),
    "table.npy": (np.ones((2, 7), int), "found int64 of shape"),
    "far.npy": (np.array([-1, 1100, 6144]), "none of its 3 row ids"),
    "nothing.npy": (np.zeros(6144, bool), "none of the 1,204 rows"),
    "objects.npy": (np.array([{}], object), "no .npy that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_lists_of_which_no_mask_can_be_made(source: Path, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = command("mask", source / "vae", "--keys", path, "--out", tmp_path / "mask")
    assert result.returncode == 2
    assert "BadMask" in result.stderr
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "mask").exists()


def test_a_key_of_several_tars_is_found_by_its_tar(source: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("b.tar\tagain\n")
    mask, _ = make_mask(source / "vae", tmp_path / "keys.txt")
    assert mask.kept == 1
    mask.put(tmp_path / "mask")
    assert joined(source, tmp_path / "mask").valid_rows.tolist() == [SHARD_ROWS + 3]


def test_a_mask_of_rows_that_failed_leaves_nothing(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ALL[image_status(ALL) == Status.IMAGE_UNDECODABLE])
    make_mask(source / "vae", tmp_path / "ids.npy")[0].put(tmp_path / "mask")
    with pytest.raises(BadMask, match=rf"none of the {len(VALID):,} rows that are valid"):
        joined(source, tmp_path / "mask")


def test_a_mask_of_another_source_is_refused_before_columns_are_read(
    source: Path, tmp_path: Path
) -> None:
    other = write_source(tmp_path / "toy", sizes=1)
    np.save(tmp_path / "ids.npy", ALL[:9])
    make_mask(other / "vae", tmp_path / "ids.npy")[0].put(tmp_path / "mask")
    for record in (other / "text/complete").glob("*"):
        record.unlink()  # whose absence would be an error of its own
    with pytest.raises(SourceMismatch, match="a mask of source"):
        open_join(source / "vae", other / "text", masks=[tmp_path / "mask"])
    words = ["--global-batch", 8, "--lanes", 8, "--mask", tmp_path / "mask"]
    result = command("order", source / "vae", source / "text", *words)
    assert result.returncode == 2
    assert "SourceMismatch" in result.stderr
    result = command("info", source / "vae", "--mask", tmp_path / "mask")
    assert result.returncode == 2
    # each mask goes to its own source, and the other one is read whole
    write_source(tmp_path / "whole", sizes=1)
    both = open_sources(
        [source / "vae", tmp_path / "whole/vae"],
        [source / "text", tmp_path / "whole/text"],
        masks=[tmp_path / "mask"],
    )
    assert [len(part.valid_rows) for part in both.by_source] == [len(VALID), len(kept(ALL[:9]))]


def test_a_source_that_is_read_twice_is_masked_twice(source: Path, tmp_path: Path) -> None:
    """As with two captions that are given as two sources; `also` holds for both, too."""
    np.save(tmp_path / "ids.npy", ALL[:99])
    make_mask(source / "vae", tmp_path / "ids.npy")[0].put(tmp_path / "mask")
    twice = open_sources(
        [source / "vae"] * 2, [source / "text"] * 2, also=[source / "text"], weights=[0.6, 0.4],
        masks=[tmp_path / "mask"],
    )  # fmt: skip
    for part in twice.by_source:
        assert part.valid_rows.tolist() == kept(ALL[:99])
        assert [column.name for column in part.also] == ["text"]


def test_a_mask_of_tars_that_held_other_rows_is_refused(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ALL[:9])
    mask, _ = make_mask(source / "vae", tmp_path / "ids.npy")
    replace(mask, index=("another", *mask.index[1:])).put(tmp_path / "mask")
    with pytest.raises(SourceMismatch, match=r"other rows in shards \[0\]"):
        joined(source, tmp_path / "mask")


def test_files_that_are_no_mask(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ALL[:9])
    mask, _ = make_mask(source / "vae", tmp_path / "ids.npy")
    assert mask.put(tmp_path / "mask")
    assert not mask.put(tmp_path / "mask")  # the same again
    with pytest.raises(BadMask, match="another file of this name"):
        make_mask(source / "vae", tmp_path / "ids.npy", drop=True)[0].put(tmp_path / "mask")
    data = (tmp_path / "mask").read_bytes()
    flipped = bytearray(data)
    flipped[-20] ^= 1
    for content in (data[:-1], data + b"0", bytes(flipped), data.replace(b'"kept":9', b'"kept":8')):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(BadMask):
            read_mask(tmp_path / "damaged")
    (tmp_path / "keys.txt").write_text("a list of keys\n")
    for path in (tmp_path / "keys.txt", tmp_path / "absent", tmp_path, source / "source.json"):
        with pytest.raises(BadMask, match="shards mask COLUMN"):
            joined(source, path)


def test_rows_out_of_the_mask_need_not_be_ok(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", VALID[:100])
    make_mask(source / "vae", tmp_path / "ids.npy")[0].put(tmp_path / "mask")
    assert len(joined(source, tmp_path / "mask", bad="error").valid_rows) == 100
    with pytest.raises(BadRows):
        joined(source, bad="error")


def test_info_says_what_a_mask_leaves(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ALL[:50])
    make_mask(source / "text", tmp_path / "ids.npy")[0].put(tmp_path / "mask")
    ok = int((image_status(ALL[:50]) == Status.OK).sum())
    result = command("info", source / "vae", "--mask", tmp_path / "mask")
    assert f"mask: 50 rows, of which {ok} are ok here" in result.stdout
    result = command("info", source / "vae", "--json", "--mask", tmp_path / "mask")
    (record,) = json.loads(result.stdout)["masks"]
    assert (record["kept"], record["valid"]) == (50, ok)
