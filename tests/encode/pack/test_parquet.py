"""Parquet into tars: the schemas of Hugging Face and img2dataset, others refused, and a killed packing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from encode.errors import NotASource
from encode.pack.kinds import Options
from encode.pack.pack import pack
from tests.encode.pack.test_pack import CAPTION, members, png, write
from tests.encode.toy import jpeg

COUNT = 7
DATA = [jpeg(i) if i % 2 else png(i) for i in range(COUNT)]
CAPTIONS = [CAPTION(i) for i in range(COUNT)]
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def schema(caption: str = "text") -> pyarrow.Schema:
    """As `Dataset.to_parquet` of the library datasets writes pictures with captions."""
    features = {"image": {"_type": "Image"}, caption: {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema([("image", IMAGE), (caption, pyarrow.string())], metadata)


def write_rows(path: Path, table_schema: pyarrow.Schema, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns, schema=table_schema)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def hugging_face(folder: Path, caption: str = "text") -> Path:
    """Two files of a split, as the hub names them."""
    images = [{"bytes": value, "path": f"{i}.jpg"} for i, value in enumerate(DATA)]
    for i, (first, last) in enumerate([(0, 5), (5, COUNT)]):
        columns = {"image": images[first:last], caption: CAPTIONS[first:last]}
        write_rows(folder / f"data/train-{i:05d}-of-00002.parquet", schema(caption), **columns)
    return folder


def expected(*rows: int) -> dict[str, bytes]:
    """Members of the tars that hold rows of `hugging_face`."""
    content = {}
    for i in rows:
        key = f"train-{i // 5:05d}-of-00002-{i % 5:08d}"
        content[f"{key}.{'jpg' if i % 2 else 'png'}"] = DATA[i]
        content[f"{key}.txt"] = CAPTIONS[i].encode()
    return content


@pytest.mark.parametrize("caption", ["text", "caption", "prompt", "Beschreibung"])
def test_hugging_face_is_packed_in_its_order(caption: str, tmp_path: Path) -> None:
    """A caption's column that is not known is the only one of text."""
    source = hugging_face(tmp_path / "source", caption)
    packed = pack(source, tmp_path / "out", Options(rows=2))
    assert (packed.record["rows"], packed.record["troubles"]["counts"]) == (COUNT, {})
    assert members(tmp_path / "out") == expected(*range(COUNT))
    again = pack(source, tmp_path / "again", Options(rows=2))
    assert [Path(t).read_bytes() for t in again.tars] == [Path(t).read_bytes() for t in packed.tars]
    one = pack(source / "data/train-00001-of-00002.parquet", tmp_path / "one")
    assert (one.record["rows"], members(tmp_path / "one")) == (2, expected(5, 6))


def test_a_picture_that_is_not_in_the_file(tmp_path: Path) -> None:
    """Null, or a path alone: `Dataset.to_parquet` without embedded files writes that."""
    images = [None, {"bytes": None, "path": "/somewhere/1.jpg"}, {"bytes": DATA[2], "path": None}]
    texts = [*CAPTIONS[:2], None]
    write_rows(tmp_path / "s/train-00000-of-00002.parquet", schema(), image=images, text=texts)
    packed = pack(tmp_path / "s", tmp_path / "out")
    counts = packed.record["troubles"]["counts"]
    assert counts == {"picture_missing": 2, "without_caption": 1}
    assert members(tmp_path / "out") == {"train-00000-of-00002-00000002.png": DATA[2]}


@pytest.mark.parametrize("binary", [pyarrow.binary(), pyarrow.large_binary()])
def test_img2dataset(binary: Any, tmp_path: Path) -> None:
    text = pyarrow.string()
    fields = pyarrow.schema([("url", text), ("caption", text), ("key", text), ("jpg", binary)])
    columns = {"url": CAPTIONS, "caption": CAPTIONS, "key": CAPTIONS, "jpg": [*DATA[:6], None]}
    write_rows(tmp_path / "s/00000.parquet", fields, **columns)
    packed = pack(tmp_path / "s", tmp_path / "out")
    assert packed.record["troubles"]["counts"] == {"picture_missing": 1}
    suffixes = ["jpg" if i % 2 else "png" for i in range(6)]
    packed_members = members(tmp_path / "out")
    assert [packed_members[f"00000-{i:08d}.{s}"] for i, s in enumerate(suffixes)] == DATA[:6]
    assert [packed_members[f"00000-{i:08d}.txt"].decode() for i in range(6)] == CAPTIONS[:6]


TEXT, BYTES = pyarrow.string(), pyarrow.binary()
OTHER = {
    "no picture": ([("url", TEXT), ("text", TEXT)], "expected one of .* for the picture"),
    "a struct without bytes": (
        [("image", pyarrow.struct([("data", BYTES), ("path", TEXT)])), ("text", TEXT)],
        "expected one of .* for the picture",
    ),
    "several pictures": ([("image", pyarrow.list_(BYTES)), ("text", TEXT)], "for the picture"),
    "numbers": ([("image", pyarrow.list_(pyarrow.uint8())), ("text", TEXT)], "for the picture"),
    "no caption": ([("image", IMAGE), ("label", pyarrow.int64())], "found the columns none, .* caption"),
    "several captions": (
        [("image", IMAGE), ("captions", pyarrow.list_(TEXT))], "found the columns none, .* caption"
    ),
    "which text": ([("image", IMAGE), ("a", TEXT), ("b", TEXT)], "found the columns a, b, .* caption"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_schema_is_refused(name: str, tmp_path: Path) -> None:
    fields, message = OTHER[name]
    empty = {field: [] for field, _ in fields}
    path = write_rows(tmp_path / "s/0.parquet", pyarrow.schema(fields), **empty)
    with pytest.raises(NotASource, match=f"{path}: .*{message}") as refusal:
        pack(tmp_path / "s", tmp_path / "out")
    assert f"The file has {fields[0][0]}: " in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_named(tmp_path: Path) -> None:
    fields = pyarrow.schema([("a", BYTES), ("b", BYTES), ("c", TEXT), ("d", TEXT)])
    columns = {"a": DATA[:1], "b": DATA[1:2], "c": CAPTIONS[:1], "d": CAPTIONS[1:2]}
    path = write_rows(tmp_path / "s/0.parquet", fields, **columns)
    pack(path, tmp_path / "out", Options(picture="b", caption="d"))
    assert list(members(tmp_path / "out").values()) == [DATA[1], CAPTIONS[1].encode()]
    with pytest.raises(NotASource, match="found the columns c, d, expected e for the caption"):
        pack(path, tmp_path / "other", Options(picture="b", caption="e"))


@pytest.mark.parametrize("names", [("a/0.parquet", "b/0.parquet"), ("0.1.parquet", "0_1.parquet")])
def test_files_whose_rows_would_share_keys(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        write_rows(tmp_path / "s" / name, schema(), image=[{"bytes": DATA[0]}], text=["a"])
    with pytest.raises(NotASource, match="the same keys. Pack each by itself"):
        pack(tmp_path / "s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_taken_by_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 100):
        image = [{"bytes": DATA[0], "path": None}]
        write_rows(tmp_path / f"s/{number}.parquet", schema(), image=image, text=[str(number)])
    pack(tmp_path / "s", tmp_path / "out")
    assert [v for k, v in members(tmp_path / "out").items() if k.endswith("txt")] == [
        b"9", b"10", b"100",
    ]  # fmt: skip


def test_damaged_files_are_named(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "source")
    broken = source / "data/train-00001-of-00002.parquet"
    data = bytearray(broken.read_bytes())
    data[4:400] = bytes(396)
    broken.write_bytes(data)
    for out, message in (("a", "00001-of-00002.parquet: damaged"), ("b", "no Parquet file")):
        with pytest.raises(NotASource, match=message):
            pack(source, tmp_path / out)
        broken.write_bytes(data[:-8])
    write(tmp_path / "text/0.parquet", "no Parquet")
    with pytest.raises(NotASource, match="0.parquet: no Parquet file"):
        pack(tmp_path / "text", tmp_path / "c")


def test_a_killed_packing_goes_on(tmp_path: Path) -> None:
    source, out = hugging_face(tmp_path / "source"), tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path; from encode.pack import pack, writer\n"
        "publish, count = writer.Staged.publish, []\n"
        "def killed(self):\n"
        "    count.append(1)\n"
        "    if len(count) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return publish(self)\n"
        "writer.Staged.publish = killed\n"
        "pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), pack.Options(rows=2))"
    )
    process = subprocess.run([sys.executable, "-c", code, source, out], check=False)
    assert process.returncode == -signal.SIGKILL
    tars = sorted(out.glob("*.tar"))
    assert [path.name for path in tars] == ["00000.tar", "00001.tar"]
    nodes = [path.stat().st_ino for path in tars]
    packed = pack(source, out, Options(rows=2))
    assert [path.stat().st_ino for path in tars] == nodes
    assert members(out) == expected(*range(COUNT))
    assert packed.record == pack(source, tmp_path / "fresh", Options(rows=2)).record
    write_rows(source / "data/train-00002.parquet", schema(), image=[None], text=["a"])
    with pytest.raises(NotASource, match="out"):
        pack(source, out, Options(rows=2))


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path / "source/0.parquet", b"PAR1")
    with pytest.raises(NotASource, match=r"pip install 'latentbank\[parquet\]'"):
        pack(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
