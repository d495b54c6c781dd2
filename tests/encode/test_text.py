"""Real MiniLM and a tiny Gemma: only real tokens are kept, and batching changes nothing but rounding."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encode.errors import ModelNotUsable
from encode.text import TextEncoder, by_length, load_text

from .toy import MINILM, spec

CAPTIONS = [
    "a cat",
    "",
    "a photograph of an astronaut who rides a horse on the moon, in colour",
    "Größe 😀",
    "a cat",
    "kitten",
]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder(spec("BertModel", MINILM), max_tokens=16)


@pytest.fixture(scope="module")
def gemma(models: Path) -> TextEncoder:
    return TextEncoder(spec("GemmaModel", models / "gemma"), max_tokens=40)


@pytest.fixture(params=["minilm", "gemma"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    found: TextEncoder = request.getfixturevalue(request.param)
    return found


@torch.no_grad()
def reference(encoder: TextEncoder, length: int) -> list[torch.Tensor]:
    """fp32 states of the real tokens by transformers alone, padded on the right as the reference pads."""
    batch = encoder._tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=length, padding_side="right",
        return_tensors="pt",
    )  # fmt: skip
    states = encoder._module(**batch, output_hidden_states=True).hidden_states[-1]
    lengths = batch.attention_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(states, lengths, strict=True)]


@torch.no_grad()
def test_ragged_equals_padded(encoder: TextEncoder) -> None:
    expected = reference(encoder, encoder.max_tokens)
    for caption, padded in zip(CAPTIONS, expected, strict=True):  # in fp32, each caption alone
        ids = torch.tensor([encoder.tokenize([caption])[0]])
        alone = encoder._module(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(alone, padded, rtol=0, atol=1e-5)
    stored = encoder.encode(CAPTIONS)
    for state, padded in zip(stored, expected, strict=True):
        assert state.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits, and the 1e-5 that may push a number over the edge.
        torch.testing.assert_close(state.float(), padded, rtol=2**-8, atol=2e-5)


def test_order_of_captions_is_kept_for_any_budget(encoder: TextEncoder) -> None:
    whole = encoder.encode(CAPTIONS)
    assert torch.equal(whole[0], whole[4])
    for budget in (1, 16, 60):
        for one, other in zip(encoder.encode(CAPTIONS, budget), whole, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=1e-4)
    assert encoder.encode([]) == []


def test_meaning_survives(minilm: TextEncoder) -> None:
    """cos(cat, kitten) is far above cos(cat, stocks), so these are the real weights."""
    states = minilm.encode(["cat", "kitten", "the stock market fell"])
    cat, kitten, stocks = (s.float().mean(0) for s in states)
    assert torch.cosine_similarity(cat, kitten, 0) > 0.6
    assert torch.cosine_similarity(cat, stocks, 0) < 0.3


def test_truncation_and_special_tokens(minilm: TextEncoder, gemma: TextEncoder) -> None:
    long = "word " * 100
    assert [len(s) for s in minilm.encode([long, "cat"])] == [16, 3]
    assert minilm.tokenize([long])[0][-1] == minilm.tokenize(["cat"])[0][-1]  # [SEP] stays last
    assert [len(s) for s in gemma.encode([long, "cat"])] == [40, 4]
    assert gemma.tokenize(["cat"])[0][0] == 2  # <bos>


def test_the_empty_caption(minilm: TextEncoder, gemma: TextEncoder, models: Path) -> None:
    assert [s.shape for s in minilm.encode([""])] == [(2, 384)]
    assert [s.shape for s in gemma.encode([""])] == [(1, 32)]
    prompted = TextEncoder(
        spec("GemmaModel", models / "gemma"), max_tokens=40, template="Image: {}."
    )
    assert prompted.tokenize([""]) == gemma.tokenize([""])  # no template around nothing
    assert prompted.tokenize(["a {}"]) == gemma.tokenize(["Image: a {}."])
    with pytest.raises(ModelNotUsable, match="the place of the caption"):
        TextEncoder(spec("GemmaModel", models / "gemma"), max_tokens=40, template="Image")


def test_other_hidden_states(models: Path, gemma: TextEncoder) -> None:
    first = TextEncoder(spec("GemmaModel", models / "gemma"), max_tokens=40, hidden_state=0)
    (state,) = first.encode(["a"])
    table = gemma._module.get_input_embeddings().weight
    ids = torch.tensor(gemma.tokenize(["a"])[0])
    torch.testing.assert_close(state.float(), table[ids] * 32**0.5, rtol=2**-7, atol=1e-6)


def test_by_the_identity_of_a_column(gemma: TextEncoder) -> None:
    how = {
        "caption": "txt", "template": "{}", "max_tokens": 40, "hidden_state": -1,
        "tokenizer": gemma.tokenizer,
    }  # fmt: skip
    identity = {"preprocess": how, "encoder": gemma.model.identity(gemma.weights)}
    again = load_text(identity)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.encode(CAPTIONS), gemma.encode(CAPTIONS), strict=True)
    )
    with pytest.raises(ModelNotUsable, match="tokenizer is another"):
        load_text(identity | {"preprocess": how | {"tokenizer": "0" * 64}})
    identity["encoder"] = gemma.model.identity("0" * 64)
    with pytest.raises(ModelNotUsable, match="weights"):
        load_text(identity)


def test_models_that_cannot_serve(models: Path) -> None:
    for model, message in (
        (spec("BertModle", MINILM), "transformers has no class 'BertModle'"),
        (
            spec("GemmaModel", MINILM),
            r"weights of GemmaModel are not in it, \['embed_tokens.weight'",
        ),
        (spec("BertModel", models / "kl"), "kl: no tokenizer can be loaded"),
        (spec("BertModel", models / "nothing"), "nothing: no such folder"),
    ):
        with pytest.raises(ModelNotUsable, match=message):
            TextEncoder(model, max_tokens=8)


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 1000))
def test_batches_by_length(lengths: list[int], budget: int) -> None:
    batches = list(by_length(lengths, budget))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
