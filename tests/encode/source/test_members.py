"""Suffixes of a config: how they are written, whether a source has them, what they pass over."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import configs
from encode.config import ColumnConfig, EncodeConfig
from encode.errors import NoSuchSuffix
from encode.plan import plan
from encode.report import status
from encode.run import job
from encode.source.members import (
    caption_in,
    caption_of,
    normal_caption,
    normal_suffix,
    passed_over,
)
from encode.source.tars import split_name
from eval.errors import MissingPictures
from eval.images.originals import Originals
from shards import Column, IndexRow, Status, seal
from shards.column import chosen, member_of
from shards.tools.verify import check_source, examine
from tests.encode import light
from tests.encode.toy import files_of, jpeg, picture, tar_bytes
from tests.encode.web import serving

COLUMN: TypeAdapter[ColumnConfig] = TypeAdapter(ColumnConfig)
Run = Callable[..., Any]

# Writing ------------------------------------------------------------------------------------------


@given(
    st.text(
        st.characters(exclude_characters="/.", exclude_categories=["Cs", "Z", "C"]), min_size=1
    ),
    st.sampled_from(["{}", ".{}", "..{}", "*.{}", " {} ", " .{}\n"]),
    st.sampled_from([str, str.upper, str.title]),
)
def test_however_it_is_written_it_is_that_of_the_member(
    suffix: str, written: str, letters: Callable[[str], str]
) -> None:
    """`split_name` says what the index of a tar holds."""
    if suffix.startswith("*"):
        return
    for compound in (suffix, f"seg.{suffix}"):
        spellings = letters(compound)
        expected = split_name(f"folder/0001.{spellings}")[1]
        assert normal_suffix(written.format(spellings)) == expected
        assert normal_suffix(expected) == expected


@pytest.mark.parametrize("text", ["", " ", ".", "*", "*.", "a/", "a/b", "/"])
def test_no_suffix(text: str) -> None:
    with pytest.raises(ValueError, match="no suffix of a member"):
        normal_suffix(text)


@pytest.mark.parametrize(
    ("text", "normal", "member"),
    [
        (".TXT", "txt", "txt"),
        ("short.txt", "short.txt", "short.txt"),
        ("*.JSON:Caption", "json:Caption", "json"),
        ("json : meta . en", "json:meta.en", "json"),
        ("c.json:caption", "c.json:caption", "c.json"),
        ("txt:1", "txt:1", "txt:1"),
        ("jsonl", "jsonl", "jsonl"),
    ],
)
def test_captions(text: str, normal: str, member: str) -> None:
    assert normal_caption(text) == normal
    assert member_of(normal) == member


@pytest.mark.parametrize("text", ["json", ".JSON", "a.json", "json:", "json:a..b", "json: .a"])
def test_json_without_a_field(text: str) -> None:
    with pytest.raises(ValidationError, match="Name the field that is one, as in .*json:caption"):
        COLUMN.validate_python({"kind": "ids", "encoder": "gemma-2-2b", "caption": text})


@pytest.mark.parametrize("kind", ["moments", "latents", "features", "tokens", "ids"])
def test_every_kind_of_column(kind: str) -> None:
    key = "caption" if kind in ("tokens", "ids") else "image"
    given_ = {"kind": kind, "encoder": "x", key: " .JPG"} | (
        {"resolution": 32} if key == "image" else {}
    )
    column = COLUMN.validate_python(given_)
    assert (column.suffix, column.model_dump()[key]) == ("jpg", "jpg")


def test_lists_of_suffixes() -> None:
    picture_ = {"kind": "features", "encoder": "x", "resolution": 32}
    text = {"kind": "ids", "encoder": "x"}
    column = COLUMN.validate_python({**picture_, "image": ["JPG", "*.jpeg", "jpg", "seg.png"]})
    assert column.suffix == "jpg|jpeg|seg.png"
    assert COLUMN.validate_python(column.model_dump()) == column
    column = COLUMN.validate_python({**text, "caption": ["Txt", "json : meta . en", "JSON:Title"]})
    assert column.suffix == "txt|json:meta.en|json:Title"
    assert member_of(column.suffix) == "txt|json"
    assert chosen({"json": 0, "txt": 0}, column.suffix) == "txt"
    assert chosen({"json": 0, "jpg": 0}, column.suffix) == "json"
    assert chosen({"jpg": 0}, column.suffix) is None
    for bad in ([], [1], ["jpg", "a/b"], 3):
        with pytest.raises(ValidationError, match=r"suffix|valid string"):
            COLUMN.validate_python({**picture_, "image": bad})
    with pytest.raises(ValidationError, match="Name the field"):
        COLUMN.validate_python({**text, "caption": ["txt", "json"]})


def test_of_several_fields_the_first_that_is_a_text_is_the_caption() -> None:
    suffix = "txt|json:a|json:b"
    assert caption_of(b'{"a": "x", "b": "y"}', "json", suffix) == ("x", Status.OK)
    assert caption_of(b'{"a": null, "b": "y"}', "json", suffix) == ("y", Status.OK)
    assert caption_of(b'{"c": "y"}', "json", suffix) == (None, Status.CAPTION_MISSING)
    assert caption_of(b"words", "txt", suffix) == ("words", Status.OK)


@pytest.mark.parametrize(
    ("data", "suffix", "caption", "status"),
    [
        (b" a cat\n", "txt", "a cat", Status.OK),
        (b'{"caption": "a"}', "txt", '{"caption": "a"}', Status.OK),
        (b'{"caption": "a"}', "json", '{"caption": "a"}', Status.OK),  # of an old column
        (b"caf\xe9", "txt", None, Status.CAPTION_UNDECODABLE),
        (b'{"caption": " a cat "}', "json:caption", "a cat", Status.OK),
        (b'{"caption": ""}', "json:caption", "", Status.OK),
        (b'{"a": {"b": {"c": "deep"}}}', "x.json:a.b.c", "deep", Status.OK),
        (b'{"a": "{\\"b\\": \\"text\\"}"}', "json:a.b", None, Status.CAPTION_MISSING),
        (b'{"a": {"b": 1}}', "json:a.c", None, Status.CAPTION_MISSING),
        (b'{"a": 1}', "json:a.b", None, Status.CAPTION_MISSING),
        (b'{"Caption": "a"}', "json:caption", None, Status.CAPTION_MISSING),
        (b'["caption"]', "json:caption", None, Status.CAPTION_MISSING),
        (b'"caption"', "json:caption", None, Status.CAPTION_MISSING),
        (b"{}", "json:caption", None, Status.CAPTION_MISSING),
        (b'{"caption": null}', "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b'{"caption": 3}', "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b'{"caption": ["a"]}', "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b'{"caption": "\\ud800"}', "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b'{"caption": "cut', "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b"[" * 100_000, "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b'{"caption": "caf\xe9"}', "json:caption", None, Status.CAPTION_UNDECODABLE),
        (b"", "json:caption", None, Status.CAPTION_UNDECODABLE),
    ],
)
def test_the_caption_of_a_member(
    data: bytes, suffix: str, caption: str | None, status: Status
) -> None:
    assert caption_in(data, suffix) == (caption, status)


def test_what_is_passed_over_is_counted_by_suffix() -> None:
    members = ["jpg txt", "png txt", "png webp", "seg.png json", "txt"]
    rows = [IndexRow(str(i), {s: (0, 1) for s in m.split()}, {}) for i, m in enumerate(members)]
    assert passed_over(rows, "jpg", True) == {"png": 2, "webp": 1, "seg.png": 1}
    assert passed_over(rows, "txt", False) == {"json": 1}
    assert passed_over(rows, "json:en", False) == {"txt": 3}


# Sources ------------------------------------------------------------------------------------------


def members(
    numbers: range, image: str = "jpg", text: str = "txt", data: bytes = jpeg(1)
) -> list[tuple[str, bytes]]:
    return [
        member
        for n in numbers
        for member in ((f"{n:03d}.{image}", data), (f"{n:03d}.{text}", f"row {n}".encode()))
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command of `encode` over some tars with encoders that load in no time."""
    monkeypatch.setattr(job, "load_encoders", light.load_encoders)
    monkeypatch.setattr(plan, "load_encoders", light.load_encoders)

    def command(
        tars: dict[str, bytes] | list[str], image: str | list[str] | None = "jpg",
        caption: str | list[str] = "txt",
        what: str = "run", source: str = "toy",
    ) -> tuple[int, str]:  # fmt: skip
        if isinstance(tars, dict):
            for name, data in tars.items():
                (tmp_path / name).write_bytes(data)
            tars = [str(tmp_path / name) for name in tars]
        columns = {
            "vae": {"kind": "moments", "encoder": "0", "resolution": 32}
            | ({"image": image} if image else {}),
            "ids": {"kind": "ids", "encoder": "0", "caption": caption},
        }
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({
            "root": str(tmp_path / "cache"), "sources": {source: tars}, "columns": columns,
            "shard_rows": 1024, "engine": {"executor": "inline", "batch": 8},
        }))  # fmt: skip
        config = configs.load(EncodeConfig, path)
        if what in ("run", "retry-failed"):
            code = job.run(config, job.Options(retry=what != "run"))
        else:
            parser = argparse.ArgumentParser()
            module: Any = {"plan": plan, "status": status}[what]
            module.add_options(parser)
            options = ["--seconds", "0"] if what == "plan" else []
            code = getattr(module, f"run_{what}")(parser.parse_args([str(path), *options]))
        return code, capsys.readouterr().out

    return command


def test_of_several_suffixes_the_first_that_a_row_has_is_read(run: Run, tmp_path: Path) -> None:
    rows = [
        {"jpg": jpeg(0), "txt": b"text"},
        {"png": jpeg(1), "json": b'{"en": "in English", "caption": "not read"}'},
        {"png": jpeg(2), "jpg": jpeg(9), "json": b'{"caption": "second field"}', "txt": b"first"},
        {"webp": jpeg(3), "json": b"{}"},
        {"jpg": jpeg(4), "json": b'{"caption": "second field"}'},
    ]
    tar = tar_bytes((f"{i}.{s}", data) for i, row in enumerate(rows) for s, data in row.items())
    code, out = run(
        {"0.tar": tar}, image=["PNG", ".jpg"], caption=["txt", "json:en", "json:caption"]
    )
    assert code == 0
    vae, ids = (Column.open(tmp_path / f"cache/toy/{name}") for name in ("vae", "ids"))
    assert vae.identity.picture.image == "png|jpg"
    assert vae.status(np.arange(5)).tolist() == [0, 0, 0, Status.IMAGE_MISSING, 0]
    assert ids.status(np.arange(5)).tolist() == [0, 0, 0, Status.CAPTION_MISSING, 0]
    # the same values as a source in which these members alone are
    alone = tmp_path / "alone"
    alone.mkdir()
    plain = [m for i in (0, 1, 2, 4) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"x"))]
    run({"alone/0.tar": tar_bytes(plain)}, source="alone")
    expected = Column.open(tmp_path / "cache/alone/vae").read(np.arange(4))
    assert np.array_equal(vae.read(np.array([0, 1, 2, 4])), expected)
    captions = ["text", "in English", "first", "second field"]
    originals = Originals(ids, tmp_path)
    for row, caption in zip([0, 1, 2, 4], captions, strict=True):
        assert (
            originals.caption(row, ids.identity.text.caption or "txt|json:en|json:caption")
            == caption
        )
    examination = examine(tmp_path / "cache/toy/vae")
    assert check_source(examination, [tmp_path]) == 1  # a shard
    assert examination.faults == []
    line = "toy/vae: 1 of 5 rows have no picture (png, jpg). They have 'webp' of 1 rows. "
    assert f"{line}A new column may read these, too: image: [png, jpg, webp]" in out
    assert "toy/ids: 1 of 5 rows have no caption (txt), nor anything in its place" in out


def test_without_a_suffix_a_column_reads_the_pictures_that_are_there(
    run: Run, tmp_path: Path
) -> None:
    """A source of jpg alone has the same column as by `image: jpg`, whatever else its rows hold."""
    masks = [(f"{n:03d}.{s}", jpeg(n)) for n in range(3) for s in ("jpg", "png", "seg.webp")]
    captions = [(f"{n:03d}.txt", b"x") for n in range(3)]
    tars = {"0.tar": tar_bytes(sorted(masks + captions)), "1.tar": tar_bytes(members(range(3)))}
    assert run(tars, image=None)[0] == 0
    files = files_of(tmp_path / "cache/toy/vae")
    assert run(tars, image="jpg") == run(tars, image=None)
    assert files_of(tmp_path / "cache/toy/vae") == files
    mixed = {
        f"{i}.tar": tar_bytes(members(range(4), suffix))
        for i, suffix in enumerate(["JPEG", "webp", "jpg", "png"])
    }
    for verb in ("plan", "run"):  # the second tar is not looked at: its rows are missing, and said
        code, out = run(mixed, image=None, source="mixed", what=verb)
        assert code == 0
    column = Column.open(tmp_path / "cache/mixed/vae")
    assert column.identity.picture.image == "jpg|jpeg|png"
    assert "4 of 16 rows have no picture (jpg, jpeg, png). They have 'webp' of 4 rows" in out
    # a column that exists goes on as it was begun
    assert run(mixed, image="jpg", source="begun")[0] == 3
    code, out = run(mixed, image=None, source="begun")
    assert (code, "every shard is committed already" in out) == (3, True)


@pytest.mark.parametrize("lost", [2, 3])
def test_a_source_that_loses_most_rows_ends_with_3(run: Run, lost: int) -> None:
    tar = tar_bytes(members(range(5 - lost)) + members(range(5 - lost, 5), "jpeg"))
    for what in ("run", "status"):
        code, out = run({"0.tar": tar}, what=what)
        assert code == (3 if lost == 3 else 0)
        assert ("MOST ROWS ARE LOST" in out) == (lost == 3)


@pytest.mark.parametrize("what", ["run", "plan", "retry-failed"])
@pytest.mark.parametrize(
    ("suffixes", "key"),
    [
        ({"image": "jpeg"}, "columns.vae.image"),
        ({"image": "seg.jpg"}, "columns.vae.image"),
        ({"caption": "caption"}, "columns.ids.caption"),
        ({"caption": "json:caption"}, "columns.ids.caption"),
    ],
)
def test_a_suffix_that_no_sample_has(
    run: Run, tmp_path: Path, what: str, suffixes: dict[str, str], key: str
) -> None:
    tars = {f"{i}.tar": tar_bytes(members(range(i, i + 3))) for i in range(12)}
    with pytest.raises(NoSuchSuffix) as caught:
        run(tars, what=what, **suffixes)
    assert caught.type.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"{key}: no sample of source 'toy' has a member with the suffix ")
    assert "in 8 of 12 tars" in message
    assert "Suffixes there, with their rows: 'jpg' (24), 'txt' (24). " in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("image", [".JPG", "*.jpg", " Jpg "])
def test_one_suffix_in_other_letters_is_one_column(run: Run, tmp_path: Path, image: str) -> None:
    tars = {"0.tar": tar_bytes(members(range(3), "JPG", "Txt"))}
    assert run(tars)[0] == 0
    files = files_of(tmp_path / "cache/toy")
    code, out = run(tars, image=image, caption=".TXT")
    assert code == 0
    assert "every shard is committed already" in out
    assert files_of(tmp_path / "cache/toy") == files


def test_several_tars_are_looked_at(run: Run, tmp_path: Path) -> None:
    """The first hold no rows, or only captions; one that cannot be read is reported in its turn."""
    texts = [(f"{n}.txt", b"alone") for n in range(3)]
    tars = {"0.tar": b"no tar" * 99, "1.tar": bytes(10_240), "2.tar": tar_bytes(texts)}
    code, out = run(tars | {"3.tar": tar_bytes(members(range(3)))})
    assert code == 3
    assert "FAILED toy/00000" in out
    assert "vae: NOT complete, 2 shards failed; 3 ok, 3 image_missing" in out


def test_half_of_a_source_has_another_suffix(run: Run) -> None:
    tars = {
        f"{i:02d}.tar": tar_bytes(members(range(2), "jpg" if i < 20 else "png")) for i in range(24)
    }
    code, out = run(tars, image="png")
    assert code == 3
    assert "vae: complete, but MOST ROWS ARE LOST, 48 rows: 8 ok, 40 image_missing" in out


def test_the_index_serves_where_tars_are_gone(run: Run, tmp_path: Path) -> None:
    tars = {"0.tar": tar_bytes(members(range(3)))}
    assert run(tars)[0] == 0
    (tmp_path / "0.tar").unlink()
    gone = [str(tmp_path / "0.tar")]
    assert run(gone, what="plan")[0] == 0
    with pytest.raises(NoSuchSuffix, match=r"'jpg' \(3\), 'txt' \(3\)"):
        run(gone, what="plan", image="png")


def test_tars_of_a_web_server(run: Run, tmp_path: Path) -> None:
    with serving(**{"0.tar": tar_bytes(members(range(3)))}) as web:
        for verb in ("run", "plan"):
            with pytest.raises(NoSuchSuffix, match="'jpeg', in 1 of 1 tars"):
                run([f"{web.url}/0.tar"], image="jpeg", what=verb)
        assert not (tmp_path / "cache").exists()
        assert run([f"{web.url}/0.tar"])[0] == 0
        whole = web.gets("/0.tar")
        assert run([f"{web.url}/0.tar"])[0] == 0  # known from the index
        assert web.gets("/0.tar") == whole


# The end of a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"), [(b"no picture", "3 image_undecodable"), (b"", "3 image_undecodable")]
)
def test_a_column_without_a_usable_row_does_not_end_like_a_good_one(
    run: Run, broken: bytes, reason: str
) -> None:
    tars = {"0.tar": tar_bytes(members(range(3), data=broken))}
    for verb in ("run", "run", "retry-failed"):
        code, out = run(tars, what=verb)
        assert code == 3
        assert f"vae: complete, but NO ROW IS USABLE, 3 rows: {reason}" in out
        assert "ids: complete, 3 rows: 3 ok" in out
    code, out = run(tars, what="status")
    assert code == 3
    assert "NO ROW IS USABLE" in out


def test_captions_without_a_usable_row(run: Run) -> None:
    tars = {"0.tar": tar_bytes([*members(range(3), text="json"), ("9.txt", b"caf\xe9")])}
    code, out = run(tars, caption="txt")
    assert code == 3
    assert "ids: complete, but NO ROW IS USABLE, 4 rows: 3 caption_missing, 1 caption_und" in out


def test_one_usable_row_is_enough(run: Run) -> None:
    cut = jpeg(2)[:-150]
    tars = {"0.tar": tar_bytes([*members(range(2), data=cut), ("9.json", b"{}")])}
    code, out = run(tars)
    assert code == 0
    assert "vae: complete, 3 rows: 2 truncated, 1 image_missing" in out


def test_what_was_passed_over_is_said(run: Run, tmp_path: Path) -> None:
    tars = {
        "0.tar": tar_bytes(members(range(3)) + members(range(3, 7), "png", "caption")),
        "1.tar": tar_bytes(members(range(2), "webp") + members(range(2, 4), "png")),
        "2.tar": tar_bytes(members(range(5))),
    }
    code, out = run(tars)
    assert code == 0
    words = (
        "toy/vae: 8 of 16 rows have no picture (jpg). They have 'png' of 6 rows, 'webp' of 2 rows. "
    )
    assert f"{words}A new column may read these, too: image: [jpg, png]" in out
    assert "toy/ids: 4 of 16 rows have no caption (txt). They have 'caption' of 4 rows. " in out
    report = json.loads((tmp_path / "cache/report.json").read_text())
    assert {k.rpartition("/")[2]: v["passed_over"] for k, v in report.items()} == {
        "vae": {"png": 6, "webp": 2}, "ids": {"caption": 4}
    }  # fmt: skip
    assert words in run(tars)[1]  # nothing to do, and said again
    planned = run(tars, what="plan")[1]
    assert (
        "toy/vae: without a member that the column reads, of the rows looked at; they have: 'png' of 6 rows"
        in planned
    )


def test_shards_of_an_older_program_are_not_counted(run: Run, tmp_path: Path) -> None:
    half = tar_bytes(members(range(3)) + members(range(3, 7), "png"))
    tars = {"0.tar": half, "1.tar": half, "2.tar": tar_bytes(members(range(3)))}
    assert run(tars)[0] == 0
    for shard in (0, 2):
        name = tmp_path / f"cache/toy/vae/commits/{shard:05d}.json"
        record = json.loads(name.read_text())
        del record["provenance"]["passed_over"], record["digest"]
        name.write_bytes(seal(record))
    code, out = run(tars)
    assert code == 0
    assert "'png' of 4 rows (1 older shards are not counted)" in out


def test_captions_in_json(run: Run, tmp_path: Path) -> None:
    members = [b'{"en": {"long": "a cat"}}', b'{"en": {}}', b'{"en": {"long": 3}}', b"no JSON"]
    tar = tar_bytes(
        m
        for i, data in enumerate(members)
        for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.json", data), (f"{i}.txt", b"other"))
    )
    for verb in ("plan", "run"):
        code, out = run({"0.tar": tar}, caption=".JSON:en.long", what=verb)
        assert code == 0
    assert "ids: complete, 4 rows: 1 ok, 1 caption_missing, 2 caption_undecodable" in out
    ids = Column.open(tmp_path / "cache/toy/ids")
    assert ids.read(np.array([0])).tolist() == [2, *map(ord, "a cat")]
    originals = Originals(ids, tmp_path)
    for field, caption in (("json:en.long", "a cat"), ("txt", "other")):
        assert originals.caption(0, field) == caption
    with pytest.raises(MissingPictures, match="1 was a caption"):
        originals.caption(1, "json:en.long")


def test_pictures_of_odd_names(run: Run) -> None:
    """Compound suffixes are suffixes like others."""
    assert picture(1).size == (48, 40)
    tars = {"0.tar": tar_bytes(members(range(3), "view.jpg", "short.txt"))}
    code, out = run(tars, image="View.JPG", caption="short.txt")
    assert code == 0
    assert "vae: complete, 3 rows: 3 ok" in out
