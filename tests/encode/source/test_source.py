"""Tars to rows: the grouping rules, and tars that are cut, damaged or none."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from encode.errors import BadTar, MissingTar, NotASource
from encode.source.places import expand
from encode.source.tars import AFTER, make_source, scan_tar, split_name
from shards import IndexRow, SourceChanged, put_index, read_index
from shards.errors import NotAColumn, StoreError
from shards.format.checks import MAX_TEXT
from shards.format.records import MAX_CAPTIONS
from shards.store.open import open_store
from tests.encode.toy import tar_bytes
from tests.encode.web import serving


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


@pytest.mark.parametrize("padding", [512, 10_240, 1 << 16, AFTER - 512, AFTER, 2 * AFTER + 512])
def test_whatever_is_behind_the_end_is_noted(tmp_path: Path, padding: int) -> None:
    """However much padding there is before it, as between tars that `cat` put together."""
    tar = tar_bytes([("a.jpg", b"a"), ("a.txt", b"a")])
    rows, note = scan(tmp_path, tar + bytes(padding))
    assert note is None
    for behind in (tar, b"\1", bytes(511) + b"\1"):
        found, note = scan(tmp_path, tar + bytes(padding) + behind)
        assert found == rows
        assert note == "more after the end of the archive at byte 2048, which is not read"


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
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = tar_bytes([(f"{'é' * 120}{i}.jpg", b"x" * 300) for i in range(4)], format=kind)
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
        b"x" * 511,
    ],
    ids=["zero bytes", "html", "no member", "short"],
)
def test_no_tar(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadTar, match=r"some\.tar: .* [Ff]etch it again"):
        scan(tmp_path, data)


@pytest.mark.parametrize(
    ("compress", "kind", "program"),
    [
        (gzip.compress, "gzip", "gunzip"),
        (bz2.compress, "bzip2", "bunzip2"),
        (lzma.compress, "xz", "unxz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd", "unzstd"),
    ],
)
def test_a_compressed_tar(
    tmp_path: Path, compress: Callable[[bytes], bytes], kind: str, program: str
) -> None:
    """Fetching it again would bring the same."""
    data = tar_bytes([("a.jpg", b"x"), ("a.txt", b"y")])
    with pytest.raises(BadTar, match=rf"not a tar \({kind}, .*Unpack it with `{program}`") as no:
        scan(tmp_path, compress(data))
    assert "etch it again" not in str(no.value)
    with pytest.raises(BadTar, match="encode pack"):
        scan(tmp_path, b"PK" + data)
    with pytest.raises(BadTar, match="git lfs pull"):
        scan(tmp_path, b"version https://git-lfs.github.com/spec/v1\n" * 20)


def test_too_many_rows(tmp_path: Path) -> None:
    data = tar_bytes((f"{i}.jpg", b"") for i in range(5))
    assert len(scan(tmp_path, data, 5)[0]) == 5
    with pytest.raises(BadTar, match="more than 4 rows, .* Split the tar"):
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


def test_names_that_no_index_could_hold(tmp_path: Path) -> None:
    """What stands in an index can be read again: longer names belong to no sample."""
    names = [
        "a.jpg",
        f"a.{'s' * 257}",
        f"{'k' * (MAX_TEXT + 1)}.jpg",
        "a.txt",
        f"{'k' * 60_000}.txt",
    ]
    rows, note = scan(tmp_path, tar_bytes((name, b"1") for name in names))
    assert [(row.key[:2], list(row.members)) for row in rows] == [("a", ["jpg", "txt"]), ("kk", ["txt"])]  # fmt: skip
    put_index(tmp_path, "s", 0, rows, note)
    assert read_index(tmp_path, 0).rows == rows
    many = tar_bytes((f"frame.{i:04d}.jpg", b"") for i in range(MAX_CAPTIONS))
    rows, note = scan(tmp_path, many)
    put_index(tmp_path, "s", 1, rows, note)
    assert read_index(tmp_path, 1).rows == rows
    with pytest.raises(
        BadTar, match="more than 256 members of one sample, 'frame'.*write 0001.jpg"
    ):
        scan(tmp_path, tar_bytes((f"frame.{i:04d}.jpg", b"") for i in range(MAX_CAPTIONS + 1)))


def test_headers_that_claim_much_or_never_end(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2")]))
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    with (tmp_path / "some.tar").open("wb") as file:  # 4 GB, of which the disk holds none
        file.write(whole[:1024] + long.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 << 30)
    rows, note = scan_tar(tmp_path / "some.tar", 1024)
    assert ([row.key for row in rows], note) == (["a"], "damaged after 1 rows")
    long.size = 0
    rows, note = scan(tmp_path, bytes(whole[:1024] + long.tobuf(tarfile.GNU_FORMAT) * 5000))
    assert ([row.key for row in rows], note) == (["a"], "damaged after 1 rows")


@pytest.mark.parametrize("how", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sparse_members_are_skipped(tmp_path: Path, how: int) -> None:
    """Their bytes do not stand in the tar as they are, and their size is not what they take there."""
    holes = tarfile.TarInfo("a.jpg")
    body = b"x" * 512
    if how == tarfile.GNU_FORMAT:
        holes.size, holes.type = len(body), tarfile.GNUTYPE_SPARSE
        header = bytearray(holes.tobuf(how))
        header[386:410] = b"%011o\0%011o\0" % (0, 512)  # what is there of it
        header[483:495] = b"%011o\0" % (1 << 32)  # what it says it is
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        first = bytes(header)
    else:
        holes.size = len(body)
        holes.pax_headers = {
            "GNU.sparse.map": "0,512", "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"
        }  # fmt: skip
        first = holes.tobuf(how)
    rows, note = scan(tmp_path, first + body + tar_bytes([("a.txt", b"1"), ("b.jpg", b"2")]))
    assert [(row.key, list(row.members)) for row in rows] == [("a", ["txt"]), ("b", ["jpg"])]
    assert note is None


def test_places_from_patterns(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "x y.tar"):
        (tmp_path / name).write_bytes(name.encode())
    source, paths = make_source("s", f"{tmp_path}/{{00..01}}.tar", 1024)
    assert source.tars == (("00.tar", 6), ("01.tar", 6))
    assert paths == [f"{tmp_path}/00.tar", f"{tmp_path}/01.tar"]
    two = make_source("s", [f"file://{tmp_path}/x%20y.tar", f"{tmp_path}/00.tar"], 1024)
    assert two[0].tars == (("x y.tar", 7), ("00.tar", 6))
    assert two[1] == [f"{tmp_path}/x y.tar", f"{tmp_path}/00.tar"]
    with pytest.raises(
        MissingTar, match=r"source 's': 2 of 4 tars are not there.*02\.tar.*03\.tar"
    ):
        make_source("s", f"{tmp_path}/{{00..03}}.tar", 1024)
    with pytest.raises(MissingTar, match="97 of 100 .*and 77 more"):
        make_source("s", [*two[1], f"{tmp_path}/{{01..98}}.tar"], 1024)
    with pytest.raises(NotASource, match="found no tar"):
        make_source("s", [], 1024)
    assert expand(["a/{1,x}/{01..02}.tar", "https://h/{8..9}.tar"]) == [
        "a/1/01.tar", "a/1/02.tar", "a/x/01.tar", "a/x/02.tar", "https://h/8.tar", "https://h/9.tar"
    ]  # fmt: skip


def test_a_path_that_exists_is_no_brace_pattern(tmp_path: Path) -> None:
    for name in ("{a,b}", "a}b", "{1..2}.x", "back\\slash"):
        (tmp_path / name).mkdir()
        (tar := tmp_path / name / "00.tar").write_bytes(b"tar")
        assert make_source("s", str(tar), 1024)[1] == [str(tar)]
        assert make_source("s", str(tar.parent), 1024)[1] == [str(tar)]
    with pytest.raises(NotASource, match="a brace without its other half"):
        make_source("s", f"{tmp_path}/{{00..03.tar", 1024)


def test_patterns_and_folders_are_the_tars_that_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of their numbers, and the same source as if they were named one by one."""
    names = ["2.tar", "10.tar", "9.tar", "01.TAR"]
    for name in [*names, "notes.txt", ".hidden.tar", "below/3.tar", "below/a/4.tar", "odd[1].tar"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)

    def bases(tars: str | list[str]) -> list[str]:
        source, paths = make_source("s", tars, 1024)
        assert [Path(path).read_bytes().decode() for path in paths]
        one_by_one, _ = make_source("s", paths, 1024)
        assert source.fingerprint == one_by_one.fingerprint
        return [name for name, _ in source.tars]

    assert bases("[0-9]*.tar") == ["2.tar", "9.tar", "10.tar"]
    assert bases(f"{tmp_path}/*.tar") == ["2.tar", "9.tar", "10.tar", "odd[1].tar"]
    assert bases("odd[1].tar") == ["odd[1].tar"]  # a name that looks like a pattern
    assert bases(".") == ["01.TAR", "2.tar", "9.tar", "10.tar", "odd[1].tar"]
    assert bases(["below", "{2,9}.tar"]) == ["3.tar", "2.tar", "9.tar"]
    assert bases("below/**/*.tar") == ["3.tar", "4.tar"]
    source, _ = make_source("s", "{2,9,10}.tar", 1024)
    assert source.fingerprint == make_source("s", "[0-9]*.tar", 1024)[0].fingerprint
    with pytest.raises(MissingTar, match=r"1 of 1 tar is not there: none-\*\.tar"):
        make_source("s", "none-*.tar", 1024)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotASource, match=r"empty: a folder without tars.*encode pack"):
        make_source("s", "empty", 1024)
    with pytest.raises(NotASource, match="does not list its files"):
        make_source("s", "https://server/set/*.tar", 1024)


def test_the_published_lists_of_blip3o(tmp_path: Path) -> None:
    """4,530 names as the reference's config gives them, and their sizes in a moment."""
    patterns = [
        f"{tmp_path}/sa_{{000000..000999}}.tar", f"{tmp_path}/webdataset_JDB_{{1..99}}.tar",
        f"{tmp_path}/webdataset_shard_{{000..999}}.tar", f"{tmp_path}/webdataset_shard_{{1000..1597}}.tar",
        f"{tmp_path}/short-caption/{{00000..01832}}.tar",
    ]  # fmt: skip
    (tmp_path / "short-caption").mkdir()
    for path in expand(patterns):
        Path(path).touch()
    start = time.process_time()
    source, paths = make_source("blip3o", patterns, 1024)
    assert len(paths) == len(source.tars) == len(set(source.tars)) == 4530
    assert time.process_time() - start < 5


@pytest.mark.parametrize("again", ["b/0.tar", "a/0.tar", "./a/0.tar"])
def test_two_tars_of_one_name(tmp_path: Path, again: str) -> None:
    """One name and one size would be one identity, whatever they hold."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(folder.encode())
    with pytest.raises(NotASource, match=r"two tars called 0\.tar, .*make each folder a source"):
        make_source("s", [f"{tmp_path}/a/0.tar", f"{tmp_path}/{again}"], 1024)


def test_tars_of_a_web_server(tmp_path: Path) -> None:
    with serving(**{f"set/{i:03d} é.tar": b"1" * i for i in range(300)}) as web:
        pattern = f"{web.url}/set/{{000..299}}%20é.tar"
        source, places = make_source("s", pattern, 1024)
        assert places == expand(pattern)
        for i in range(300):  # the same source as the same tars in a folder
            (tmp_path / f"{i:03d} é.tar").write_bytes(b"1" * i)
        local, _ = make_source("s", f"{tmp_path}/{{000..299}} é.tar", 1024)
        assert source.fingerprint == local.fingerprint
        with pytest.raises(MissingTar, match=r"1 of 301 tars is not there: http://.*/set/300%20é"):
            make_source("s", f"{web.url}/set/{{000..300}}%20é.tar", 1024)
        for place, why in (
            ("set/0.tar?token=secret", "found a query"), ("set/0.tar#1", "found a fragment"),
            ("set//0.tar", "found .* empty parts"), ("set/../0.tar", "found empty parts"),
        ):  # fmt: skip
            with pytest.raises((StoreError, NotASource), match=why) as caught:
                make_source("s", f"{web.url}/{place}", 1024)
            assert "secret" not in str(caught.value)
        for place in ("set/", ""):
            with pytest.raises(NotASource, match="found no file's name"):
                make_source("s", f"{web.url}/{place}", 1024)
        web.fault = lambda method, path, part: "401"
        with pytest.raises(StoreError, match=r"looking up failed.*401"):
            make_source("s", pattern, 1024)
    with pytest.raises(NotAColumn, match="found the scheme 'ftp'"):
        make_source("s", "ftp://h/0.tar", 1024)


def test_tars_of_an_object_store(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    for i in range(3):
        store.put_if_absent(f"set/{i}.tar", b"1" * i)
    source, places = make_source("s", f"{url}/set/{{0..2}}.tar", 1024)
    assert source.tars == (("0.tar", 0), ("1.tar", 1), ("2.tar", 2))
    assert places == [f"{url}/set/{i}.tar" for i in range(3)]
    store.put_if_absent("set/10.tar", b"10")
    store.put_if_absent("set/below/4.tar", b"4")
    globbed, places = make_source("s", f"{url}/set/*.tar", 1024)
    assert places == [f"{url}/set/{i}.tar" for i in (0, 1, 2, 10)]
    assert (
        globbed.fingerprint == make_source("s", f"{url}/set/{{0,1,2,10}}.tar", 1024)[0].fingerprint
    )
    with pytest.raises(MissingTar, match=f"2 of 5 tars are not there: {url}/set/3.tar, "):
        make_source("s", f"{url}/set/{{0..4}}.tar", 1024)
