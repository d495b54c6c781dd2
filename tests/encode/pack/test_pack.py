"""Every kind of source into tars, the same bytes each time, and what becomes of what does not fit."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from encode.errors import NotASource
from encode.pack.kinds import Options, kind_of
from encode.pack.pack import mostly_lost, pack, report, source_lines
from encode.source.places import natural
from encode.source.tars import scan_tar
from shards.errors import NoRoom
from tests.commands.lines import next_lines
from tests.encode.toy import jpeg, picture

COUNT = 7
CAPTION = "picture {} of a cat, é".format


def members(out: Path) -> dict[str, bytes]:
    """Every member of the tars of a folder, in order."""
    content = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                content[member.name] = file.read()
    return content


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path) -> list[str]:
    """COUNT pictures of several suffixes in two folders; their names, in the order of their keys."""
    names = []
    for i in range(COUNT):
        suffix = ("jpg", "jpeg", "png", "JPG")[i % 4]
        name = f"{'ab'[i >= 4]}/{i:03d}.{suffix}"
        write(folder / name, png(i) if suffix == "png" else jpeg(i))
        names.append(name)
    return names


def beside(suffix: str, text: Callable[[int], str]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        for i, name in enumerate(pictures(folder)):
            write(folder / f"{name.rpartition('.')[0]}.{suffix}", text(i))
        return folder

    return made


def table(name: str, columns: tuple[str, str], delimiter: str = ",") -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        names = pictures(folder)
        rows = [{columns[0]: n, columns[1]: CAPTION(i), "id": i} for i, n in enumerate(names)]
        random.Random(0).shuffle(rows)
        text = io.StringIO()
        if name.endswith("jsonl"):
            text.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            writer = csv.DictWriter(text, ["id", *columns], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        path = write(folder / name, text.getvalue())
        return folder if name.startswith("metadata") else path

    return made


def img2dataset(folder: Path) -> Path:
    """What `img2dataset --output_format files` leaves."""
    beside("txt", CAPTION)(folder)
    for i, name in enumerate(pictures(folder)):
        fields = {"caption": CAPTION(i), "status": "success"}
        write(folder / f"{name.rpartition('.')[0]}.json", json.dumps(fields))
    write(folder / "a_stats.json", "{}")
    write(folder / "a.parquet", b"PAR1")
    return folder


SOURCES = {
    "text files": ("folder", beside("txt", CAPTION)),
    "caption files": ("folder", beside("caption", CAPTION)),
    "json files": ("folder", beside("json", lambda i: json.dumps({"prompt": CAPTION(i)}))),
    "img2dataset": ("folder", img2dataset),
    "metadata.csv": ("imagefolder", table("metadata.csv", ("file_name", "text"))),
    "metadata.jsonl": ("imagefolder", table("metadata.jsonl", ("file_name", "caption"))),
    "csv": ("table", table("list.csv", ("path", "caption"))),
    "semicolons": ("table", table("list.csv", ("Image", "Text"), ";")),
    "tsv": ("table", table("list.tsv", ("filepath", "title"), "\t")),
    "jsonl": ("table", table("list.jsonl", ("image", "prompt"))),
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_kind_becomes_the_same_rows(name: str, tmp_path: Path) -> None:
    kind, make = SOURCES[name]
    source = make(tmp_path / "source")
    assert kind_of(source) == kind
    packed = pack(source, tmp_path / "out", Options(rows=3))
    names = pictures(tmp_path / "again")
    expected = {}
    for i, file in enumerate(names):
        stem, _, suffix = file.rpartition(".")
        expected[f"{stem}.{suffix.lower()}"] = (tmp_path / "again" / file).read_bytes()
        expected[f"{stem}.txt"] = CAPTION(i).encode()
    content = members(tmp_path / "out")
    assert {n: d for n, d in content.items() if not n.endswith(".json")} == expected
    # what `encode` makes of them: rows in order, whose keys are the paths
    rows = [row for tar in packed.tars for row in scan_tar(Path(tar), 1024)[0]]
    assert [row.key for row in rows] == [n.rpartition(".")[0] for n in names]
    assert all(len(row.members) >= 2 for row in rows)
    assert [len(scan_tar(Path(tar), 1024)[0]) for tar in packed.tars] == [3, 3, 1]
    assert not mostly_lost(packed.record)
    assert packed.record["rows"] == COUNT
    assert "{00000..00002}.tar" in source_lines(packed)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", "pack.json"
    ]  # fmt: skip


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path) -> None:
    beside("txt", CAPTION)(tmp_path / "one")
    files = [p for p in (tmp_path / "one").rglob("*") if p.is_file()]
    for path in sorted(files, reverse=True):  # another order on disk, other dates and rights
        copy = write(tmp_path / "two" / path.relative_to(tmp_path / "one"), path.read_bytes())
        copy.chmod(0o600)
        os.utime(copy, (1, 1))
    for name in ("one", "two"):
        pack(tmp_path / name, tmp_path / f"{name}-out", Options(rows=3))
    for i in range(3):
        one, two = (tmp_path / f"{n}-out/0000{i}.tar" for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        with tarfile.open(one) as tar:
            assert {(m.uid, m.gid, m.uname, m.mtime, m.mode) for m in tar} == {(0, 0, "", 0, 0o644)}


def test_a_second_packing_does_nothing_and_another_source_is_refused(tmp_path: Path) -> None:
    source = beside("txt", CAPTION)(tmp_path / "source")
    out = tmp_path / "out"
    assert pack(source, out).fresh
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert not pack(source, out).fresh
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(NotASource, match="another --rows"):
        pack(source, out, Options(rows=2))
    write(source / "a/000.txt", "another caption")
    with pytest.raises(NotASource, match=r"packed from something else .*other files or dates"):
        pack(source, out)
    os.truncate(out / "00000.tar", 512)
    with pytest.raises(NotASource, match="other files|Delete"):
        pack(source, out)
    assert {p for p in out.iterdir()} == set(before)


def test_what_does_not_fit_is_counted_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    source = tmp_path / "source"
    secret = write(tmp_path / "secret.jpg", jpeg(99))
    for i in range(8):
        write(source / f"{i}.jpg", jpeg(i))
        write(source / f"{i}.txt", CAPTION(i))
    write(source / "8.jpg", jpeg(8))
    write(source / "lonely.txt", "no picture")
    write(source / "0.png", png(0))  # a second picture of the key 0
    write(source / "A.webp", b"w")
    write(source / "A.txt", "in capitals")
    write(source / "a.webp", b"w")
    write(source / "a.txt", "in small letters")
    write(source / "notes.md", "x")
    write(source / "LICENSE", "x")
    write(source / ".hidden.jpg", jpeg(1))
    write(source / "v1.5.final.jpg", jpeg(2))
    write(source / "v1.5.final.txt", "dots in the name")
    (source / "out.jpg").symlink_to(secret)
    (source / "in.jpg").symlink_to("3.jpg")
    (source / "in.txt").symlink_to("3.txt")
    (source / "loop").symlink_to(source)
    os.mkfifo(source / "pipe.jpg")
    packed = pack(source, tmp_path / "out")
    troubles = packed.record["troubles"]
    assert troubles["counts"] == {
        "without_caption": 1, "caption_without_picture": 1, "doubles": 1, "case_only": 1,
        "outside": 2, "unreadable": 1,
    }  # fmt: skip
    assert packed.record["others"] == {"md": 1, "none": 1}
    content = members(tmp_path / "out")
    assert content["in.jpg"] == jpeg(3)
    assert content["v1_5_final.txt"] == b"dots in the name"
    assert {n for n in content if n[0] in "0o"} == {"0.jpg", "0.txt"}
    text = report(packed.record)
    assert re.search(r"count +┃ what +┃ the first of them +┃", text)
    assert re.search(r"│ +1 │ caption without a picture +│ \S*lonely.txt", text)
    assert not mostly_lost(packed.record)


def test_paths_of_a_table_stay_in_its_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    secret = write(tmp_path / "secret.jpg", jpeg(9))
    rows = [
        {"path": "a/000.jpg", "caption": "one"},
        {"path": str(tmp_path / "in/a/001.jpeg"), "caption": "an absolute path inside"},
        {"path": "../secret.jpg", "caption": "above"},
        {"path": str(secret), "caption": "an absolute path outside"},
        {"path": "https://server/x.jpg", "caption": "a url"},
        {"path": "a/none.jpg", "caption": "no such file"},
        {"path": "a/000.jpg", "caption": "once more"},
        {"path": "", "caption": "no path"},
        {"path": "b/004.jpg", "caption": None},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = write(tmp_path / "in/list.jsonl", lines + "{broken\n[1]\n")
    packed = pack(path, tmp_path / "out")
    assert packed.record["troubles"]["counts"] == {
        "outside": 3, "picture_missing": 1, "doubles": 1, "caption_without_picture": 1,
        "broken_lines": 2, "without_caption": 1,
    }  # fmt: skip
    content = members(tmp_path / "out")
    assert list(content) == ["a/000.jpg", "a/000.txt", "a/001.jpeg", "a/001.txt", "b/004.jpg"]
    assert content["a/000.txt"] == b"one"
    assert mostly_lost(packed.record)
    # the same paths from the folder above are inside it
    wide = pack(path, tmp_path / "wide", Options(pictures=tmp_path))
    assert wide.record["troubles"]["counts"]["picture_missing"] == 4


BAD = {
    "nothing": (lambda f: f.mkdir(), Options(), "no picture to pack .nothing in it"),
    "compressed tars": (
        lambda f: write(f / "0.tar.gz", b"\x1f\x8b"), Options(), "those of .gz are tars, unpack them"
    ),
    "captions alone": (lambda f: write(f / "a.txt", "x"), Options(), "1 caption without picture"),
    "tars": (lambda f: write(f / "0.tar", b"x"), Options(), "holds tars already"),
    "tars below": (
        lambda f: write(f / "a/0.tar", b"x"), Options(), r"holds tars already.*/\*\*/\*\.tar",
    ),
    "wrong kind": (lambda f: write(f / "a.jpg", b"x"), Options("table"), "not a CSV"),
    "no metadata": (lambda f: write(f / "a.jpg", b"x"), Options("imagefolder"), "no metadata.csv"),
    "no column": (
        lambda f: write(f / "metadata.csv", "who,what\n1,2\n"), Options(),
        "found the columns who, what, expected one of file_name",
    ),
    "column of another name": (
        lambda f: write(f / "metadata.csv", "file_name,text\na.jpg,x\n"), Options(caption="words"),
        "expected words for the caption. Name it with --caption",
    ),
    "not UTF-8": (
        lambda f: write(f / "metadata.csv", b"file_name,text\na.jpg,\xff\n"), Options(),
        "no table in UTF-8",
    ),
    "all outside": (
        lambda f: write(f / "metadata.csv", "file_name,text\n../a.jpg,x\nhttp://a/b.jpg,y\n"),
        Options(), "every path of 2 lines leaves",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_have_an_error_and_leave_nothing(name: str, tmp_path: Path) -> None:
    make, options, message = BAD[name]
    make(tmp_path / "source")
    with pytest.raises(NotASource, match=message):
        pack(tmp_path / "source", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_something_else_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = beside("txt", CAPTION)(tmp_path / "source")
    write(tmp_path / "out/00000.tar", b"mine")
    with pytest.raises(NotASource, match=r"it holds 00000.tar and no pack.json"):
        pack(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["00000.tar"]
    (tmp_path / "busy/.packing").mkdir(parents=True)
    handle = os.open(tmp_path / "busy/.packing", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(NotASource, match="another command packs"):
        pack(source, tmp_path / "busy")
    os.close(handle)
    monkeypatch.setattr("encode.pack.writer.SPARE", 1 << 62)
    with pytest.raises(NoRoom, match="free. Make room"):
        pack(source, tmp_path / "full")
    assert not (tmp_path / "full").exists()
    for name in ("no/such/folder", "source/a/000.jpg"):
        with pytest.raises(NotASource, match=r"no such folder|a file of jpg; expected"):
            pack(tmp_path / name, tmp_path / "never")


@pytest.mark.parametrize("captions", [0, 2, 4])
def test_the_command_says_where_most_is_lost(captions: int, tmp_path: Path) -> None:
    names = pictures(tmp_path / "source")
    for i in range(captions):
        write(tmp_path / f"source/{names[i].rpartition('.')[0]}.txt", CAPTION(i))
    write(tmp_path / "source/list.csv", "path,caption\n")
    process = subprocess.run(
        [sys.executable, "-m", "encode", "pack", "source", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "118"},
    )  # fmt: skip
    assert process.returncode == (0 if captions == 4 else 3), process.stderr
    assert f"{COUNT - captions} │ packed without a caption" in process.stdout
    assert f'sources: {{ out: "{tmp_path}/out/00000.tar" }}' in process.stdout
    words = "--sources out --vae flux --text gemma-2b    # or models of your own"
    assert next_lines(process.stdout) == [f"next: python -m encode init {words}"]
    assert ("pack that file" in process.stderr) == (captions < 4)


def test_names_that_are_not_utf8_are_packed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos \udce9t\udce9")
    os.mkdir(folder)
    for name, data in ((b"caf\xe9.jpg", jpeg(1)), (b"caf\xe9.txt", b"coffee")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    packed = pack(Path(os.fsdecode(folder)), tmp_path / "out")
    (row,), note = scan_tar(Path(packed.tars[0]), 1024)
    assert (set(row.members), note) == ({"jpg", "txt"}, None)
    assert packed.record["source"] == f"{tmp_path.resolve()}/photos \\udce9t\\udce9"
    assert report(packed.record)


def test_runs_of_digits_sort_as_numbers() -> None:
    names = ["b", "a10", "a9", "a09", "a", "9", "10"]
    assert sorted(names, key=natural) == ["9", "10", "a", "a09", "a9", "a10", "b"]
