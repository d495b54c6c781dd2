"""Encoded prompts: the same bits as fresh ones, whoever wrote them and in whatever order; read a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encode.models.text import TextEncoder
from eval.errors import BadTextCache
from eval.images.encoders import Text
from eval.images.prompt_cache import CHUNK, TextCache
from shards.format.identity import CaptionPreprocess, ColumnIdentity

TEXTS = [" ".join(["red", "cat", "on", "the", "flag"][: 1 + i % 5]) for i in range(2 * CHUNK + 9)]
IDENTITY = {"class": "BertModel", "weights": "w"}


def never() -> TextEncoder:
    raise AssertionError("the text encoder was loaded")


def fresh(text: TextEncoder, texts: Sequence[str]) -> list[Tensor]:
    """As the cache has them made: in chunks of the whole list."""
    return [
        row for at in range(0, len(texts), CHUNK) for row in text.encode(texts[at : at + CHUNK])
    ]


def test_cached_is_fresh_to_the_bit_and_needs_no_encoder(tmp_path: Path, text: TextEncoder) -> None:
    expected = fresh(text, TEXTS)
    first = TextCache(tmp_path, IDENTITY, TEXTS, "cpu")
    assert first.missing() == ["empty", "00000", "00001", "00002"]
    first.fill(range(len(TEXTS)), lambda: text)
    again = TextCache(tmp_path, IDENTITY, TEXTS, "cpu")
    assert again.missing() == []
    again.fill(range(len(TEXTS)), never)
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
    for i, row in zip(order, again.read(order), strict=True):
        assert row.dtype == torch.bfloat16
        assert torch.equal(row, expected[i])
    assert torch.equal(again.empty, text.encode([""])[0])
    assert len(again._kept) <= 3  # chunks, not all: thirty thousand prompts do not fit into memory


def test_what_is_in_a_chunk_depends_on_nothing_else(tmp_path: Path, text: TextEncoder) -> None:
    """Not on the rank that made it, nor on the prompts that were asked for."""
    folders = [tmp_path / name for name in ("one", "two")]
    TextCache(folders[0], IDENTITY, TEXTS, "cpu").fill(range(len(TEXTS)), lambda: text)
    for rank, needed in ((3, [CHUNK + 1]), (1, [0, 2 * CHUNK]), (0, range(len(TEXTS)))):
        TextCache(folders[1], IDENTITY, TEXTS, "cpu").fill(needed, lambda: text, rank)
    item, two = ({p.name: p.read_bytes() for p in f.rglob("*.safetensors")} for f in folders)
    assert item == two
    assert len(item) == 4


def test_other_text_is_kept_elsewhere(tmp_path: Path) -> None:
    """Another encoder, reading, list of prompts or kind of device."""
    base = TextCache(tmp_path, IDENTITY, TEXTS, "cpu").folder
    assert TextCache(tmp_path, dict(IDENTITY), list(TEXTS), "cpu").folder == base
    others = [
        TextCache(tmp_path, {**IDENTITY, "weights": "v"}, TEXTS, "cpu"),
        TextCache(tmp_path, IDENTITY, TEXTS[1:], "cpu"),
        TextCache(tmp_path, IDENTITY, TEXTS, "cuda:1"),
    ]
    assert len({base, *(other.folder for other in others)}) == 4


def test_identity_says_how_captions_are_read(text: TextEncoder) -> None:
    how = {
        "max_tokens": 16,
        "hidden_state": -1,
        "template": "{}",
        "tokenizer": text.tokenizer.weights,
    }
    encoder = text.model.identity(text.weights)
    column = ColumnIdentity(encoder=encoder, preprocess=CaptionPreprocess(**how, caption="txt"))
    identity = Text(column, None, "cpu").identity
    assert identity == {"class": "BertModel", "precision": "fp32", "weights": text.weights, **how}
    moved = column.model_copy(update={"encoder": encoder.model_copy(update={"path": "/elsewhere"})})
    assert Text(moved, None, "cpu").identity == identity  # wherever the weights lie
    longer = column.model_copy(
        update={"preprocess": column.text.model_copy(update={"max_tokens": 20})}
    )
    assert Text(longer, None, "cpu").identity != identity


def test_a_damaged_file_is_named(tmp_path: Path, text: TextEncoder) -> None:
    TextCache(tmp_path, IDENTITY, TEXTS, "cpu").fill([0], lambda: text)
    file = next(tmp_path.rglob("00000.safetensors"))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (bytes(flipped), whole[:-7], b"", b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(BadTextCache, match=r"00000\.safetensors: .*Delete it"):
            TextCache(tmp_path, IDENTITY, TEXTS, "cpu").read([3])
    file.unlink()
    again = TextCache(tmp_path, IDENTITY, TEXTS, "cpu")
    again.fill([0], lambda: text)
    assert file.read_bytes() == whole
