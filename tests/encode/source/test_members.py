"""Suffixes of a config: how they are written, and what is read of a member."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from encode.config import ColumnConfig
from encode.source.members import (
    caption_in,
    caption_of,
    normal_caption,
    normal_suffix,
    passed_over,
)
from encode.source.tars import split_name
from shards import IndexRow, Status
from shards.column import chosen, member_of

COLUMN: TypeAdapter[ColumnConfig] = TypeAdapter(ColumnConfig)


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
