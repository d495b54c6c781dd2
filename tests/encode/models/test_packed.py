"""A text encoder over packed ids gives what it gives caption by caption, whatever stands beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from encode.config import IdsColumn
from encode.errors import ModelNotUsable
from encode.models import packed_text as packed
from encode.models.load import load_encoder
from encode.models.packed_text import PackedText, model_of, packed_rows, similar_rows, token_places
from encode.models.text import TextEncoder, load_text
from encode.models.tokenizer import CaptionTokenizer, load_tokenizer
from encode.registry import ModelSpec
from tests.encode.tiny_models import SMALL, TEXTS, Models, saved

CAPTIONS = [
    "a cat", "a photograph of an astronaut who rides a horse on the moon", "", "Größe 😀",
    "two words", "a cat on a mat with a hat and a bat, and a rat that sat on it", "x",
]  # fmt: skip


def ids_column(tiny: Models, name: str, **options: Any) -> dict[str, Any]:
    """The identity of an ids column for a model."""
    config = IdsColumn(
        kind="ids", encoder=ModelSpec.model_validate(tiny(name)), max_tokens=70, **options
    )
    return load_encoder(config, "cpu").identity().record()


def encoder(tiny: Models, name: str, hidden_state: int = -1, **options: Any) -> PackedText:
    model = ModelSpec.model_validate(tiny(name))
    return PackedText.of_ids(ids_column(tiny, name, **options), model, hidden_state)


def packed_ids(text: TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    ids = text.tokenizer(captions)
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0, dtype=torch.int32)
    return torch.tensor(list(chain(*ids)), dtype=torch.int32), ends


@pytest.mark.parametrize("name", TEXTS)
def test_every_family(tiny: Models, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in rows so short that the captions take several, and passes of few rows."""
    packed_text = encoder(tiny, name)
    expected = torch.cat([packed_text.text.encode([caption])[0] for caption in CAPTIONS])
    ids, ends = packed_ids(packed_text.text, CAPTIONS)
    for row, tokens, similar in ((1_024, 16_384, 2_048), (80, 160, 80)):
        for limit, value in (("ROW", row), ("PASS", tokens), ("SIMILAR", similar)):
            monkeypatch.setattr(packed, limit, value)
        states = packed_text(ids, ends)
        assert (states.dtype, states.shape) == (torch.bfloat16, expected.shape)
        assert not states.requires_grad
        # one unit in the last of bfloat16's 8 bits, where fp32 falls to the other side
        torch.testing.assert_close(states.float(), expected.float(), rtol=2**-7, atol=2e-5)
        assert (states == expected).float().mean() > 0.99


def test_which_families_are_packed(tiny: Models) -> None:
    """The others could not be: their attention would pass from caption to caption."""
    assert {name for name in TEXTS if encoder(tiny, name).text.cls in packed.CUT} == {
        "gemma", "gemma2", "qwen2", "qwen3",
    }  # fmt: skip


def test_another_hidden_state(tiny: Models) -> None:
    packed_text = encoder(tiny, "gemma2", 1)
    expected = torch.cat([packed_text.text.encode([caption])[0] for caption in CAPTIONS])
    states = packed_text(*packed_ids(packed_text.text, CAPTIONS))
    torch.testing.assert_close(states.float(), expected.float(), rtol=2**-7, atol=2e-5)


def test_captions_without_ids(tiny: Models) -> None:
    for name in ("gemma", "t5"):
        packed_text = encoder(tiny, name)
        ids, ends = packed_ids(packed_text.text, ["a cat", "x"])
        states = packed_text(ids, ends)
        holes = torch.tensor([0, 0, *ends.tolist()[1:2], *ends.tolist()[1:], ends[-1]]).int()
        assert torch.equal(packed_text(ids, holes), states)
        nothing = packed_text(ids[:0], torch.zeros(4, dtype=torch.int32))
        assert (nothing.shape, nothing.dtype) == ((0, 32), torch.bfloat16)


def test_it_is_the_encoder_of_a_tokens_column(tiny: Models) -> None:
    """Its identity is one: the encoder can be loaded by it, here and where pictures are sampled."""
    options = {"template": "A picture of {}", "instruction": "Draw. "}
    packed_text = encoder(tiny, "gemma", **options)
    text = load_text(packed_text.identity)
    ids, ends = packed_ids(packed_text.text, CAPTIONS)
    assert packed_ids(text, CAPTIONS)[0].tolist() == ids.tolist()
    assert torch.equal(PackedText(text, packed_text.identity)(ids, ends), packed_text(ids, ends))
    reloaded = PackedText.of_tokens(packed_text.identity)
    assert reloaded.identity == packed_text.identity
    assert packed_text.identity["encoder"]["weights"] == packed_text.text.weights
    assert "caption" not in packed_text.identity["preprocess"]


def test_only_with_the_tokenizer_of_the_column(tiny: Models) -> None:
    identity = ids_column(tiny, "qwen2")
    with pytest.raises(ModelNotUsable, match="the tokenizer is another than the column's"):
        PackedText.of_ids(identity, ModelSpec.model_validate(tiny("gemma")))
    with pytest.raises(ModelNotUsable, match="no model of the registry has this tokenizer"):
        PackedText.of_ids(identity)
    assert load_tokenizer(identity)(CAPTIONS) == encoder(tiny, "qwen2").text.tokenizer(CAPTIONS)
    identity["encoder"]["weights"] = "0" * 64
    with pytest.raises(ModelNotUsable, match="the tokenizer is another"):
        load_tokenizer(identity)


def test_a_model_with_too_few_positions(tmp_path: Path, tiny: Models) -> None:
    """Refused when it is loaded, not at the first long caption of a training run."""
    column = ids_column(tiny, "gemma")
    shutil.copytree(tiny("gemma")["path"], tmp_path / "m")
    config = {
        **SMALL, "vocab_size": 300, "max_position_embeddings": 71, "pad_token_id": 1,
    }  # fmt: skip
    saved(tmp_path / "m", "transformers", "XLMRobertaModel", config)
    model = ModelSpec.model_validate({"class": "XLMRobertaModel", "path": str(tmp_path / "m")})
    with pytest.raises(ModelNotUsable, match="XLMRobertaModel cannot encode captions of up to 70"):
        PackedText.of_ids(column, model)


def test_the_registry_knows_the_model_of_an_ids_column() -> None:
    named = packed.TEXTS["t5-xxl"]
    tokenizer = named.model_copy(update={"cls": "AutoTokenizer", "precision": "fp32"})
    assert model_of(tokenizer.identity("digest")) == named


def test_the_empty_caption_is_stored_as_ids(tiny: Models) -> None:
    tokenizer = load_encoder(
        IdsColumn(kind="ids", encoder=ModelSpec.model_validate(tiny("gemma"))), "cpu"
    )
    assert isinstance(tokenizer, CaptionTokenizer)
    (empty,) = tokenizer.rows([""], 99)
    assert (empty.dtype, empty.tolist()) == (np.int32, [2])  # <bos> alone


@given(st.lists(st.integers(0, 3_000), max_size=40))
def test_each_caption_stands_once(lengths: list[int]) -> None:
    counts = np.array(lengths, np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    for layout in (packed_rows, similar_rows):
        tokens: list[int] = []
        for rows in layout(counts):
            token, position = token_places(rows, ends)
            assert token.size <= max(packed.PASS, packed.ROW, max(lengths))
            mask = token >= 0
            tokens += token[mask].tolist()
            for r, row in enumerate(rows):
                at = 0
                for i in row:
                    place = slice(at, at + lengths[i])
                    assert token[r, place].tolist() == list(range(ends[i], ends[i + 1]))
                    assert position[r, place].tolist() == list(range(lengths[i]))
                    at += lengths[i]
                assert not mask[r, at:].any()
        assert sorted(tokens) == list(range(int(ends[-1])))
