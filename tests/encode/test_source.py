"""Tars to rows: the grouping rules, and tars that are cut, damaged or none."""

import hashlib
import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from encode.errors import BadTar, MissingTar
from encode.source import make_source, scan_tar, split_name
from shards import IndexRow, SourceChanged, put_index, read_index

from .toy import tar_bytes


def scan(tmp_path: Path, data: bytes, limit: int = 1024) -> tuple[list[IndexRow], str | None]:
    path = tmp_path / "some.tar"
    path.write_bytes(data)
    return scan_tar(path, limit)


def rows_of(tmp_path: Path, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    data = tar_bytes((name, name.encode()) for name in names)
    rows, note = scan(tmp_path, data)
    assert note is None
    for row in rows:  # each member's bytes are where the index says
        for offset, size in row.members.values():
            name = data[offset : offset + size].decode()
            assert split_name(name)[0] == row.key
    return [(row.key, list(row.members)) for row in rows]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["a.jpg", "a.txt", "b.jpg", "b.txt"], [("a", ["jpg", "txt"]), ("b", ["jpg", "txt"])]),
        (["a.jpg", "b.jpg", "a.txt"], [("a", ["jpg"]), ("b", ["jpg"]), ("a", ["txt"])]),
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], [("a", ["jpg", "txt"])] * 2),
        (["a.txt", "a.short.txt", "a.jpg"], [("a", ["txt", "short.txt", "jpg"])]),
        (["x/a.jpg", "x/a.txt", "y/a.jpg"], [("x/a", ["jpg", "txt"]), ("y/a", ["jpg"])]),
        (["./a.jpg", "./a.txt"], [("./a", ["jpg", "txt"])]),
        (["v1.0/a.jpg", "v1.0/b.jpg"], [("v1.0/a", ["jpg"]), ("v1.0/b", ["jpg"])]),
        (["a.JPG", "a.Txt"], [("a", ["jpg", "txt"])]),
        # What belongs to no sample takes no row and parts none, as in webdataset.
        (["README", "a.jpg", "._a.jpg", "x/.DS_Store", "a.txt"], [("a", ["jpg", "txt"])]),
        (["é" * 80 + ".jpg", "n" * 300 + ".jpg"], [("é" * 80, ["jpg"]), ("n" * 300, ["jpg"])]),
    ],
)  # fmt: skip
def test_grouping(tmp_path: Path, names: list[str], rows: list[tuple[str, list[str]]]) -> None:
    assert rows_of(tmp_path, names) == rows


def test_keys_and_suffixes_are_those_of_webdataset() -> None:
    from webdataset.tariterators import base_plus_ext

    names = "a.jpg a/b.c.txt a.b/c.d ./x.tar.gz d/e/f.g README .hidden a.b/c"
    for name in names.split():
        key, suffix = base_plus_ext(name)
        assert split_name(name) == (key, suffix) if key else not all(split_name(name))


def test_links_and_folders_are_skipped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE), ("a.jpg", tarfile.REGTYPE), ("a.png", tarfile.SYMTYPE),
            ("a.gif", tarfile.LNKTYPE), ("a.dev", tarfile.CHRTYPE), ("a.txt", tarfile.REGTYPE),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    rows, note = scan(tmp_path, buffer.getvalue())
    assert [(row.key, list(row.members)) for row in rows] == [("a", ["jpg", "txt"])]
    assert note is None


def test_captions_are_digested(tmp_path: Path) -> None:
    data = tar_bytes(
        [
            ("a.jpg", b"1"),
            ("a.txt", b"cat"),
            ("a.short.txt", b"c"),
            ("a.long.txt", b"x" * (2 << 20)),
        ]
    )
    ((row,), _) = scan(tmp_path, data)
    assert row.captions == {
        "txt": hashlib.sha256(b"cat").hexdigest(), "short.txt": hashlib.sha256(b"c").hexdigest()
    }  # fmt: skip


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cut_at_every_block(tmp_path: Path, how: int) -> None:
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"]
    if how != tarfile.USTAR_FORMAT:
        names = [f"{'é' * 120}{name}" for name in names]  # extra headers
    whole = tar_bytes([(n, bytes(700 if n.endswith("jpg") else 30)) for n in names], format=how)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [(m.name, m.offset_data + m.size, m.offset_data) for m in tar.getmembers()]
    archive_end = ends[-1][2] + 512
    for cut in [
        *range(0, len(whole) + 1, 512),
        *(end for _, end, _ in ends),
        *(end - 1 for _, end, _ in ends),
    ]:
        kept = [name for name, end, _ in ends if end <= cut]
        if not kept:
            with pytest.raises(BadTar, match="Fetch it again"):
                scan(tmp_path, whole[:cut])
            continue
        rows, note = scan(tmp_path, whole[:cut])
        assert [f"{row.key}.{s}" for row in rows for s in row.members] == kept
        assert (note is None) == (cut >= archive_end + 512), cut  # one block of the end is enough


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    """tarfile stops there without a word; so do other readers, which then lose rows silently."""
    data = bytearray(tar_bytes((f"{i}.jpg", b"x" * 600) for i in range(5)))
    data[2 * 1536 : 2 * 1536 + 8] = b"\xff" * 8
    rows, note = scan(tmp_path, bytes(data))
    assert [row.key for row in rows] == ["0", "1"]
    assert note == "damaged at byte 3072: neither a member nor the end"


def test_a_member_of_negative_size_ends_the_tar(tmp_path: Path) -> None:
    """It would lead tarfile back, for ever."""
    data = bytearray(tar_bytes((f"{i}.jpg", b"x" * 600) for i in range(3)))
    for size in (-512, -1024, -1536, -1):
        header = data[1536:2048]
        header[124:136] = (256**12 + size).to_bytes(13, "big")[1:]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        rows, note = scan(tmp_path, bytes(data[:1536] + header + data[2048:]))
        assert [row.key for row in rows] == ["0"]
        assert note == "damaged after 1 rows"


def test_random_damage_ends_in_rows_or_bad_tar(tmp_path: Path) -> None:
    chance = random.Random(0)
    for how in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = tar_bytes([(f"{'é' * 120}{i}.jpg", b"x" * 300) for i in range(4)], format=how)
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                block = chance.randrange(len(data) // 512) * 512
                data[block + chance.randrange(512)] = chance.randrange(256)
                if (
                    data[block + 257 : block + 262] == b"ustar"
                ):  # a header: damage that passes its sum
                    data[block + 124 + chance.randrange(12)] = chance.choice(b"01234567-\x80\xff ")
                    data[block + 148 : block + 156] = b" " * 8
                    data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
            try:
                rows, _ = scan(tmp_path, bytes(data))
            except BadTar:
                continue
            assert all(
                o >= 0 and 0 <= n <= len(data) - o for r in rows for o, n in r.members.values()
            )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!doctype html><html>Rate limit</html>" * 40,
        bytes(10_240),
        b"\x1f\x8b" + bytes(600),
        b"x" * 511,
    ],
    ids=["zero bytes", "html", "no member", "gzip", "short"],
)
def test_no_tar(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadTar, match=r"some\.tar: .* Fetch it again"):
        scan(tmp_path, data)


def test_too_many_rows(tmp_path: Path) -> None:
    data = tar_bytes((f"{i}.jpg", b"") for i in range(5))
    assert len(scan(tmp_path, data, 5)[0]) == 5
    with pytest.raises(BadTar, match="5 rows, a shard has room for 4. Split the tar"):
        scan(tmp_path, data, 4)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    rows, note = scan(tmp_path, tar_bytes([("a\udcff.jpg", b"1")], format=tarfile.USTAR_FORMAT))
    assert [row.key for row in rows] == ["a\\xff"]
    put_index(tmp_path, "s", 0, rows, note)
    assert read_index(tmp_path, 0).rows == rows


def test_index_twice_and_changed(tmp_path: Path) -> None:
    members = [("a.jpg", b"12"), ("a.txt", b"cat")]
    first = put_index(tmp_path, "s", 0, *scan(tmp_path, tar_bytes(members)))
    assert put_index(tmp_path, "s", 0, *scan(tmp_path, tar_bytes(members))) == first
    for changed in (
        [("a.jpg", b"12"), ("a.txt", b"dog")],
        [*members, ("b.jpg", b"")],
        members[::-1],
    ):
        with pytest.raises(SourceChanged, match="restore the tar, or make it a new source"):
            put_index(tmp_path, "s", 0, *scan(tmp_path, tar_bytes(changed)))


def test_sources_from_patterns(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "x.tar"):
        (tmp_path / name).write_bytes(name.encode())
    source, paths = make_source("s", f"{tmp_path}/{{00..01}}.tar", 1024)
    assert source.tars == (("00.tar", 6), ("01.tar", 6))
    assert paths == [tmp_path / "00.tar", tmp_path / "01.tar"]
    assert make_source("s", [f"{tmp_path}/x.tar", f"{tmp_path}/00.tar"], 1024)[0].tars[0] == (
        "x.tar",
        5,
    )
    with pytest.raises(MissingTar, match=r"source 's': 1 of 3 tars are not there.*02\.tar"):
        make_source("s", f"{tmp_path}/{{00..02}}.tar", 1024)
    with pytest.raises(MissingTar, match="0 of 0"):
        make_source("s", [], 1024)
