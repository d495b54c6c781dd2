"""Typed identities say what their JSON says, to the byte."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import IdentityMismatch, canonical_json
from shards.format.identity import (
    CaptionPreprocess,
    ColumnIdentity,
    EncoderIdentity,
    PicturePreprocess,
    preprocess_of,
)

GOLDEN = Path(__file__).parents[2] / "golden"
ENCODER = {"class": "AutoencoderKL", "path": "a/b", "weights": "0" * 64}
PICTURE = {"encoder": ENCODER, "preprocess": {"resolution": 256}}
CAPTION = {
    "encoder": ENCODER, "preprocess": {"max_tokens": 9, "template": "{}", "tokenizer": "1" * 64},
}  # fmt: skip


def same(record: dict[str, Any]) -> ColumnIdentity:
    """The typed form, whose canonical JSON is that of the record."""
    identity = ColumnIdentity.of(json.loads(canonical_json(record)))
    assert canonical_json(identity.record()) == canonical_json(record)
    return identity


def test_golden_columns_are_the_same_to_the_byte() -> None:
    identities = []
    with tarfile.open(GOLDEN / "columns.tar.xz") as tar:
        for member in tar:
            if member.name.endswith("column.json"):
                file = tar.extractfile(member)
                assert file is not None
                identities.append(same(json.loads(file.read())["identity"]))
    kinds = {identity.kind: identity for identity in identities}
    assert kinds.keys() == {"moments", "tokens", "ids"}
    assert kinds["moments"].picture.resolution == 16
    assert kinds["tokens"].text.hidden_state == -1
    with pytest.raises(IdentityMismatch, match="found a column of ids, expected .* of pictures"):
        _ = kinds["ids"].picture


def test_frozen_identities_are_the_same_to_the_byte() -> None:
    """Of each kind of column and of the demo's encoders, as releases before had them."""
    frozen = json.loads((GOLDEN / "frozen.json").read_bytes())
    columns = [value for key, value in frozen.items() if key.startswith("identity/")]
    records = [column["identity"] for column in columns if isinstance(column, dict)]
    assert len(records) > 3
    for record in records:
        same(record)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
UNKNOWN = st.dictionaries(WORDS.map(lambda word: f"new_{word}"), VALUES, max_size=3)
LISTS = st.lists(NUMBERS, min_size=3, max_size=3)
TEXTS = {name: WORDS for name in ("image", "decoder", "resize", "crop", "output")}
MAYBE = WORDS | st.none()


def objects(required: dict[str, Any], more: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of some fields, of `more`, and of fields that no release knows yet."""
    known = st.fixed_dictionaries(required, optional=more)
    return st.builds(lambda *parts: parts[0] | parts[1], UNKNOWN, known)


ENCODERS = objects(
    {"class": WORDS, "path": WORDS, "weights": WORDS},
    {"subfolder": MAYBE, "revision": MAYBE, "precision": WORDS, "tokenizer": MAYBE},
)
PREPROCESS = objects(
    {"resolution": st.integers()}, TEXTS | {"mean": LISTS, "std": LISTS}
) | objects(
    {"max_tokens": st.integers(), "template": WORDS, "tokenizer": WORDS},
    {"caption": WORDS, "instruction": WORDS, "chat_template": WORDS, "hidden_state": st.integers()},
)
IDENTITIES = objects(
    {"encoder": ENCODERS, "preprocess": PREPROCESS},
    {"kind": WORDS, "dtype": WORDS, "source": WORDS},
)


@given(IDENTITIES)
def test_any_identity_is_the_same_to_the_byte(record: dict[str, Any]) -> None:
    identity = same(record)
    part = record["preprocess"]
    assert isinstance(
        identity.preprocess, PicturePreprocess if "resolution" in part else CaptionPreprocess
    )
    assert canonical_json(identity.encoder.record()) == canonical_json(record["encoder"])


@given(VALUES | st.dictionaries(st.sampled_from(["encoder", "preprocess", "kind"]), VALUES))
def test_what_is_no_identity_is_refused(record: Any) -> None:
    with pytest.raises(IdentityMismatch, match="found|missing"):
        ColumnIdentity.of(record)


@pytest.mark.parametrize(
    ("part", "field", "value", "match"),
    [
        ("encoder", "path", None, "encoder.path: found null, expected text"),
        ("encoder", "class", 7, "encoder.class: found 7"),
        (
            "preprocess",
            "resolution",
            True,
            "preprocess.resolution: found true, expected a whole number",
        ),
        ("preprocess", "resolution", 256.0, r"resolution: found 256.0"),
    ],
)
def test_a_field_of_another_type_is_named(part: str, field: str, value: Any, match: str) -> None:
    record = {**PICTURE, part: {**PICTURE[part], field: value}}
    with pytest.raises(IdentityMismatch, match=match):
        ColumnIdentity.of(record)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(IdentityMismatch, match="encoder.weights is missing"):
        ColumnIdentity.of({**CAPTION, "encoder": {"class": "x", "path": "y"}})
    for record, field in ((CAPTION, "template"), (PICTURE, "resolution")):
        fields = dict(record["preprocess"])
        del fields[field]
        with pytest.raises(IdentityMismatch, match=f"column: preprocess.{field} is missing"):
            ColumnIdentity.of({**record, "preprocess": fields})


def test_another_place_is_the_same_model_elsewhere() -> None:
    encoder = EncoderIdentity.of(ENCODER)
    moved = encoder.model_copy(update={"path": "c", "tokenizer": None})
    assert moved.record() == {**ENCODER, "path": "c", "tokenizer": None}
    assert encoder.record() == ENCODER


def test_identities_of_other_programs_may_say_anything() -> None:
    assert preprocess_of({"preprocess": "none"}) is None
    assert preprocess_of({}) is None
    assert preprocess_of(CAPTION) == CAPTION["preprocess"]
