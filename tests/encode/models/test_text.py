"""Real MiniLM and a tiny model of every family: only real tokens are kept, and batching changes nothing but
rounding."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encode.config import TokensColumn
from encode.errors import ModelNotUsable
from encode.models.text import TextEncoder, by_length, load_text
from encode.registry import ModelSpec
from tests.encode.tiny_models import TEXTS, Models
from tests.encode.toy import MINILM, save_gemma, spec, text_encoder

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
    return text_encoder(spec("BertModel", MINILM), max_tokens=16)


@pytest.fixture(scope="module")
def gemma(models: Path) -> TextEncoder:
    return text_encoder(spec("GemmaModel", models / "gemma"), max_tokens=40)


@pytest.fixture(scope="module", params=["minilm", *TEXTS])
def encoder(request: pytest.FixtureRequest, minilm: TextEncoder, tiny: Models) -> TextEncoder:
    return minilm if request.param == "minilm" else made(tiny, request.param)


def made(tiny: Models, name: str, **options: Any) -> TextEncoder:
    return text_encoder(ModelSpec.model_validate(tiny(name)), **{"max_tokens": 40, **options})


@torch.no_grad()
def reference(encoder: TextEncoder, length: int) -> list[torch.Tensor]:
    """fp32 states of the real tokens by transformers alone, padded on the right as the reference pads."""
    batch = encoder.tokenizer._tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=length, padding_side="right",
        return_tensors="pt",
    )  # fmt: skip
    states = encoder._module(**batch).last_hidden_state
    lengths = batch.attention_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(states, lengths, strict=True)]


@torch.no_grad()
def test_ragged_equals_padded(encoder: TextEncoder) -> None:
    expected = reference(encoder, encoder.config.max_tokens)
    stored = encoder.encode(CAPTIONS)
    for caption, padded, state in zip(CAPTIONS, expected, stored, strict=True):
        if not len(padded):  # Qwen's tokenizer makes nothing of the empty caption; see below
            assert not caption
            continue
        # in fp32, each caption alone
        ids = torch.tensor([encoder.tokenizer([caption])[0]])
        alone = encoder._module(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(alone, padded, rtol=0, atol=1e-5)
        assert state.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits, and the 1e-5 that may push a number over the edge.
        torch.testing.assert_close(state.float(), padded, rtol=2**-8, atol=2e-5)


def test_order_of_captions_is_kept_for_any_budget(encoder: TextEncoder) -> None:
    whole = encoder.encode(CAPTIONS)
    assert torch.equal(whole[0], whole[4])
    for budget in (1, 16, 60):
        for states, expected in zip(encoder.encode(CAPTIONS, budget), whole, strict=True):
            assert states.shape == expected.shape
            torch.testing.assert_close(states.float(), expected.float(), rtol=2**-7, atol=1e-4)
    assert encoder.encode([]) == []


def test_meaning_survives(minilm: TextEncoder) -> None:
    """cos(cat, kitten) is far above cos(cat, stocks), so these are the real weights."""
    states = minilm.encode(["cat", "kitten", "the stock market fell"])
    cat, kitten, stocks = (s.float().mean(0) for s in states)
    assert torch.cosine_similarity(cat, kitten, 0) > 0.6
    assert torch.cosine_similarity(cat, stocks, 0) < 0.3


def test_special_tokens_of_each_family(tiny: Models) -> None:
    """(before a caption, behind it, of the empty one)"""
    expected: dict[str, tuple[list[int], list[int], list[int]]] = {
        "gemma": ([2], [], [2]), "gemma2": ([2], [], [2]),  # <bos>, no <eos>
        "t5": ([], [1], [1]),  # </s> behind, nothing before
        "clip": ([0], [1], [0, 1]),
        "qwen2": ([], [], [0]), "qwen3": ([], [], [0]),  # its padding token stands for nothing
    }  # fmt: skip
    for name, (head, tail, empty) in expected.items():
        tokenize = made(tiny, name).tokenizer
        plain = tokenize._plain("cat")
        assert tokenize(["cat", ""]) == [head + plain + tail, empty], name


def test_truncation_and_special_tokens(minilm: TextEncoder, gemma: TextEncoder) -> None:
    long = "word " * 100
    assert [len(s) for s in minilm.encode([long, "cat"])] == [16, 3]
    assert minilm.tokenizer([long])[0][-1] == minilm.tokenizer(["cat"])[0][-1]  # [SEP] stays last
    assert [len(s) for s in gemma.encode([long, "cat"])] == [40, 4]
    assert gemma.tokenizer(["cat"])[0][0] == 2  # <bos>


def test_the_empty_caption(minilm: TextEncoder, gemma: TextEncoder, models: Path) -> None:
    assert [s.shape for s in minilm.encode([""])] == [(2, 384)]
    assert [s.shape for s in gemma.encode([""])] == [(1, 32)]
    prompted = text_encoder(
        spec("GemmaModel", models / "gemma"), max_tokens=40, template="Image: {}."
    )
    assert prompted.tokenizer([""]) == gemma.tokenizer([""])  # no template around nothing
    assert prompted.tokenizer(["a {}"]) == gemma.tokenizer(["Image: a {}."])
    with pytest.raises(ModelNotUsable, match="the place of the caption"):
        text_encoder(spec("GemmaModel", models / "gemma"), max_tokens=40, template="Image")


def test_an_instruction_takes_nothing_from_the_caption(tiny: Models) -> None:
    """As in the reference: max_tokens of the caption, and the instruction's tokens without <bos> on top."""
    plain = made(tiny, "gemma", max_tokens=10)
    instructed = made(tiny, "gemma", max_tokens=10, instruction="Draw: ")
    assert instructed.tokenizer.limit == 16
    (ids,) = instructed.tokenizer(["a long caption"])
    assert ids == plain.tokenizer._tokenizer("Draw: a long caption").input_ids[:16]
    assert len(plain.tokenizer(["a long caption"])[0]) == 10
    assert instructed.tokenizer([""]) == plain.tokenizer([""])
    templated = made(tiny, "gemma", max_tokens=30, instruction="Draw: ", template="<{}>")
    assert templated.tokenizer(["cat"]) == [plain.tokenizer._tokenizer("Draw: <cat>").input_ids]


def test_chat_template(tiny: Models) -> None:
    chat = made(tiny, "qwen2", max_tokens=8, chat_template=True, instruction="Draw ")
    tokenizer = chat.tokenizer._tokenizer

    def ids(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer(["a cat"]) == [ids(f"{head}Draw a cat{tail}")]
    assert chat.tokenizer([""]) == [ids(head + tail)]  # a message that says nothing
    assert chat.tokenizer(["a" * 50]) == [ids(f"{head}Draw {'a' * 8}{tail}")]  # stays closed
    assert chat.tokenizer.limit == len(ids(f"{head}Draw {'a' * 8}{tail}"))
    assert len(chat.encode(["a" * 50])[0]) == chat.tokenizer.limit
    with pytest.raises(ModelNotUsable, match="no chat template. Leave chat_template out"):
        made(tiny, "t5", chat_template=True)


def test_gemma_2_caps_its_attention(tiny: Models) -> None:
    """Only eager attention does; with the caps off the states differ."""
    from transformers import Gemma2Model

    capped = made(tiny, "gemma2")
    ids = torch.tensor(capped.tokenizer(["a photograph of an astronaut"]))
    free = Gemma2Model.from_pretrained(
        tiny("gemma2")["path"], attn_logit_softcapping=None, attn_implementation="eager"
    )
    states = capped._module(input_ids=ids).last_hidden_state
    assert (states - free(input_ids=ids).last_hidden_state).abs().max() > 1e-4


def test_bf16_autocast_keeps_fp32_weights(tiny: Models, gemma: TextEncoder) -> None:
    model = ModelSpec.model_validate({**tiny("gemma"), "precision": "bf16-autocast"})
    half = text_encoder(model, max_tokens=40)
    assert {p.dtype for p in half._module.parameters()} == {torch.float32}
    assert half.weights == gemma.weights
    for state, whole in zip(half.encode(CAPTIONS), gemma.encode(CAPTIONS), strict=True):
        torch.testing.assert_close(state.float(), whole.float(), rtol=0.05, atol=0.1)
        assert not torch.equal(state, whole)


def test_gemma_without_its_first_token(tmp_path: Path) -> None:
    """What a broken tokenizer would do to every caption."""
    folder = save_gemma(tmp_path / "gemma")
    file = folder / "tokenizer.json"
    broken = json.loads(file.read_text())
    broken["post_processor"] = None
    file.write_text(json.dumps(broken))
    with pytest.raises(ModelNotUsable, match="expected <bos> alone"):
        text_encoder(spec("GemmaModel", folder), max_tokens=8)


def test_the_tokenizer_may_stand_elsewhere(tmp_path: Path, tiny: Models) -> None:
    """As text_encoder_3 and tokenizer_3 of the SD3.5 repository."""
    whole = Path(tiny("t5")["path"])
    (tmp_path / "text_encoder_3").mkdir()
    (tmp_path / "tokenizer_3").mkdir()
    for file in whole.iterdir():
        place = "tokenizer_3" if file.name.startswith("token") else "text_encoder_3"
        shutil.copy(file, tmp_path / place)
    model = spec("T5EncoderModel", tmp_path, subfolder="text_encoder_3", tokenizer="tokenizer_3")
    encoder, same = text_encoder(model, max_tokens=40), made(tiny, "t5")
    assert (encoder.weights, encoder.tokenizer.weights) == (same.weights, same.tokenizer.weights)
    assert model.identity("w").tokenizer == "tokenizer_3"
    assert "tokenizer" not in same.model.identity("w").record()


def test_other_hidden_states(models: Path, gemma: TextEncoder) -> None:
    first = text_encoder(spec("GemmaModel", models / "gemma"), max_tokens=40, hidden_state=0)
    (state,) = first.encode(["a"])
    table = gemma._module.get_input_embeddings().weight
    ids = torch.tensor(gemma.tokenizer(["a"])[0])
    torch.testing.assert_close(state.float(), table[ids] * 32**0.5, rtol=2**-7, atol=1e-6)


def test_by_the_identity_of_a_column(gemma: TextEncoder) -> None:
    preprocess = {
        "caption": "txt", "template": "{}", "max_tokens": 40, "hidden_state": -1,
        "tokenizer": gemma.tokenizer.weights,
    }  # fmt: skip
    identity = {"preprocess": preprocess, "encoder": gemma.model.identity(gemma.weights).record()}
    text = load_text(identity)
    assert all(
        torch.equal(a, b)
        for a, b in zip(text.encode(CAPTIONS), gemma.encode(CAPTIONS), strict=True)
    )
    with pytest.raises(ModelNotUsable, match="tokenizer is another"):
        load_text(identity | {"preprocess": preprocess | {"tokenizer": "0" * 64}})
    identity["encoder"] = gemma.model.identity("0" * 64).record()
    with pytest.raises(ModelNotUsable, match="weights"):
        load_text(identity)


def test_by_an_identity_with_every_option(tiny: Models) -> None:
    config = TokensColumn(
        kind="tokens", encoder=ModelSpec.model_validate(tiny("qwen2")), max_tokens=12,
        instruction="Draw ", chat_template=True, hidden_state=-2,
    )  # fmt: skip
    encoder = TextEncoder(config)
    identity = encoder.identity().record()
    text = load_text(identity)
    for states, expected in zip(text.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True):
        assert torch.equal(states, expected)
    identity["preprocess"]["chat_template"] = "0" * 64
    with pytest.raises(ModelNotUsable, match="the chat template is another"):
        load_text(identity)


def test_models_that_cannot_serve(models: Path) -> None:
    for model, message in (
        (spec("BertModle", MINILM), "transformers has no class 'BertModle'"),
        (
            spec("Qwen2Model", MINILM),
            r"weights of Qwen2Model are not in it, \['embed_tokens.weight'",
        ),
        (spec("BertModel", models / "kl"), "kl: no tokenizer can be loaded"),
        (spec("BertModel", models / "nothing"), "nothing: no such folder"),
    ):
        with pytest.raises(ModelNotUsable, match=message):
            text_encoder(model, max_tokens=8)


def test_classes_that_would_lie_or_fail(tiny: Models) -> None:
    def other(name: str, cls: str) -> ModelSpec:
        return ModelSpec.model_validate({**tiny(name), "class": cls})

    for name, cls, message in (
        ("t5", "AutoModel", "not a text encoder alone. .* T5EncoderModel"),
        ("clip", "AutoModel", "not a text encoder alone. .* CLIPTextModel"),
    ):
        with pytest.raises(ModelNotUsable, match=message):
            text_encoder(other(name, cls), max_tokens=8)
    headed = text_encoder(other("qwen2", "Qwen2ForCausalLM"), max_tokens=8)
    with pytest.raises(ModelNotUsable, match="head's output"):
        headed.encode(["cat"])
    with pytest.raises(ModelNotUsable, match="hidden state 3 asked for, there are 3"):
        _ = made(tiny, "t5", hidden_state=3).width
    with pytest.raises(ModelNotUsable, match="captions of 78 tokens asked for, the model takes 77"):
        made(tiny, "clip", max_tokens=78)


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 1000))
def test_batches_by_length(lengths: list[int], budget: int) -> None:
    batches = list(by_length(lengths, budget))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
