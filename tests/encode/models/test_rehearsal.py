"""What would fail or lie in a run is refused when its encoder is loaded, and nothing is written."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from encode.config import ColumnConfig, EncodeConfig, EngineConfig, IdsColumn
from encode.errors import ModelNotUsable
from encode.models.load import load_encoder, load_encoders
from encode.models.rehearsal import TOLERANCE, difference, long_caption, pictures, rehearse
from encode.models.tokenizer import CaptionTokenizer, load_tokenizer
from encode.plan.plan import add_options, run_plan
from encode.registry import ModelSpec
from encode.run import job
from tests.encode.models.encoders_page import WITHOUT_POSTERIOR
from tests.encode.tiny_models import (
    EYES,
    GROUPED,
    SIDE,
    SMALL,
    TEXTS,
    VAES,
    Models,
    save_tokenizer,
    saved,
)
from tests.encode.toy import MINILM, spec, write_source

CONFIG: TypeAdapter[Any] = TypeAdapter(ColumnConfig)
ENGINE = EngineConfig(executor="inline", device="cpu")
BERT = ["<s>", "<pad>", "</s>"]
NAMED = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}


def tried(engine: EngineConfig = ENGINE, **column: Any) -> Any:
    """The encoder of a column, loaded as a driver does."""
    return load_encoders({"c": CONFIG.validate_python(column)}, engine)["c"]


def refused(message: str, **column: Any) -> None:
    with pytest.raises(ModelNotUsable, match=message):
        tried(**column)


def tokenizer(model: ModelSpec, max_tokens: int) -> CaptionTokenizer:
    return CaptionTokenizer(IdsColumn(encoder=model, max_tokens=max_tokens))


def text_model(folder: Path, cls: str, config: dict[str, Any], chat: str | None = None) -> Any:
    """`encoder` of a random model with a tokenizer that puts <s> before and </s> behind."""
    size = save_tokenizer(folder, BERT, "<s> $A </s>", chat, **NAMED)
    saved(folder, "transformers", cls, {"vocab_size": size, "pad_token_id": 1, **config})
    return {"class": cls, "path": str(folder)}


# of families with no shift in their configs
SCALES = {"dc": 0.41407, "hunyuan": 0.5, "asymmetric": 0.18215, "vq": 0.5, "kvae": 1.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_every_family_passes(tiny: Models, precision: str) -> None:
    for name in [*VAES, *EYES, *TEXTS]:
        encoder = {**tiny(name), "precision": precision}
        column: dict[str, Any] = {"kind": "tokens", "max_tokens": 24}
        if name in EYES:
            column = {"kind": "features"}
        elif name in VAES:
            kind = "latents" if name in WITHOUT_POSTERIOR else "moments"
            column = {"kind": kind, "resolution": SIDE}
            if name in SCALES:
                column |= {"norm": {"shift": [0.0], "scale": [SCALES[name]]}}
        tried(encoder=encoder, **column)


def test_real_weights_pass() -> None:
    for precision in ("fp32", "bf16-autocast"):
        encoder = {"class": "BertModel", "path": MINILM, "precision": precision}
        tried(kind="tokens", encoder=encoder, max_tokens=256)
    tried(kind="ids", encoder={"class": "BertModel", "path": MINILM}, max_tokens=3)


# Widths and positions ----------------------------------------------------------------------------


def widths(folder: Path) -> dict[str, tuple[Any, int]]:
    """Models whose states are not as wide as their config says at first sight."""
    layer = {**GROUPED, "query_pre_attn_scalar": 16, "vocab_size": 259}
    two = {"encoder": layer, "decoder": {**layer, "hidden_size": 64}, "is_encoder_decoder": False}
    opt = {
        "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "do_layer_norm_before": False,
    }  # fmt: skip
    clip = {**SMALL, "projection_dim": 24, "bos_token_id": 0, "eos_token_id": 2}
    return {
        "t5gemma": (text_model(folder / "t5gemma", "T5GemmaEncoderModel", two), 32),
        "opt": (text_model(folder / "opt", "OPTModel", opt), 16),
        "clip": (text_model(folder / "clip", "CLIPTextModelWithProjection", clip), 32),
    }


@pytest.mark.parametrize("name", ["t5gemma", "opt", "clip"])
@pytest.mark.parametrize("element", ["bfloat16", "int8"])
def test_widths_are_found_by_running(tmp_path: Path, name: str, element: str) -> None:
    encoder, width = widths(tmp_path)[name]
    values: dict[str, Any] = {
        "root": str(tmp_path / "root"), "sources": {"s": write_source(tmp_path / "tars", 1, 3)},
        "columns": {
            "t": {"kind": "tokens", "encoder": encoder, "max_tokens": 24, "element": element}
        },
        "shard_rows": 1024, "engine": ENGINE.model_dump(),
    }  # fmt: skip
    assert job.run(EncodeConfig.model_validate(values)) == 0
    record = json.loads((tmp_path / "root/s/t/column.json").read_text())
    assert record["layout"]["row_shape"] == [24, width]


def test_positions_are_found_by_running(tmp_path: Path) -> None:
    """XLM-RoBERTa's first two positions are no token's."""
    roberta = text_model(
        tmp_path / "m", "XLMRobertaModel", {**SMALL, "max_position_embeddings": 66}
    )
    column: dict[str, Any] = {"kind": "tokens", "encoder": roberta}
    assert tried(**column, max_tokens=64).row_shape == (64, 32)
    for most in (65, 66):
        refused(f"captions of up to {most} tokens. Lower max_tokens", **column, max_tokens=most)
    # what comes on top of max_tokens counts
    refused("up to 65 tokens", **column, max_tokens=55, instruction="in colour ")


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    for name, token in (("pad", "<pad>"), ("eos", "</s>"), ("letter", "c")):
        folder = tmp_path / name
        size = save_tokenizer(folder, BERT, "<s> $A </s>", **NAMED)
        config = {**GROUPED, "vocab_size": size}
        saved(folder, "transformers", "LlamaModel", config)
        # its id is moved behind all others, as that of a token added to a finished model
        file = folder / "tokenizer.json"
        said = json.loads(file.read_text())
        vocabulary = said["model"]["vocab"]
        vocabulary[token] = size
        for added in said["added_tokens"]:
            added["id"] = vocabulary[added["content"]]
        for special in said["post_processor"]["special_tokens"].values():
            special["ids"] = [vocabulary[word] for word in special["tokens"]]
        file.write_text(json.dumps(said))
        encoder = {"class": "LlamaModel", "path": str(folder)}
        column = {"encoder": encoder, "max_tokens": 24}
        refused(f"makes the token {size} .* has embeddings of {size}", kind="tokens", **column)
        tried(kind="ids", **column)


def test_a_caption_that_spells_an_unknown_token(tmp_path: Path) -> None:
    """As Gemma 3 of 1B: a token of its tokenizer has no embedding, and hardly any caption has it."""
    folder = tmp_path / "m"
    special = ["<pad>", "<eos>"]
    named = {"pad_token": "<pad>", "eos_token": "<eos>"}
    size = save_tokenizer(folder, special, "$A <eos>", **named)
    saved(folder, "transformers", "LlamaModel", {**GROUPED, "vocab_size": size})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    encoder = tried(
        kind="tokens", encoder={"class": "LlamaModel", "path": str(folder)}, max_tokens=24
    )
    assert len(encoder.rows(["a cat"], 99)) == 1
    with pytest.raises(ModelNotUsable, match=rf"makes the token {size} \('<image>'\)"):
        encoder.rows(["a <image>"], 99)


# Random numbers and neighbours -------------------------------------------------------------------


def test_a_model_that_hides_parts_at_random(tmp_path: Path) -> None:
    config = {**SMALL, "image_size": SIDE, "patch_size": 16, "mask_ratio": 0.5}
    folder = saved(tmp_path / "mae", "transformers", "ViTMAEModel", config)
    refused(
        "ViTMAEModel gives a picture other values each time: it draws random numbers",
        kind="features", encoder={"class": "ViTMAEModel", "path": str(folder)}, resolution=SIDE,
        mean=[0.5] * 3, std=[0.5] * 3,
    )  # fmt: skip


class Changed(torch.nn.Module):
    """A layer whose output is changed."""

    def __init__(
        self, layer: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.change(self.layer(*args, **options))


OWN = torch.Generator()
CHANGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "dropout": (lambda h: torch.nn.functional.dropout(h, 0.1), "draws random numbers"),
    # as of a posterior that is drawn from, far below any rounding
    "noise": (lambda h: h + 1e-3 * torch.randn_like(h), "draws random numbers"),
    "numpy": (
        lambda h: h * float(1 + np.random.rand()),
        "draws random numbers",
    ),  # what a model may use
    "own generator": (
        lambda h: h + 1e-3 * torch.randn(h.shape, generator=OWN),
        "draws random numbers",
    ),
    "batch norm": (
        lambda h: torch.nn.functional.batch_norm(h, None, None, training=True),
        "in a batch than alone",
    ),
    "mean of the batch": (lambda h: h - h.mean(0, keepdim=True), "in a batch than alone"),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_pictures_that_are_no_function_of_the_picture(
    tiny: Models, change: str, precision: str
) -> None:
    column = {
        "kind": "moments", "encoder": {**tiny("flux"), "precision": precision}, "resolution": SIDE
    }  # fmt: skip
    encoder = load_encoder(CONFIG.validate_python(column), "cpu")
    rehearse(encoder, ENGINE)
    layer, message = CHANGES[change]
    vae = encoder._module.encoder
    vae.conv_in = Changed(vae.conv_in, layer)
    with pytest.raises(ModelNotUsable, match=message):
        rehearse(encoder, ENGINE)


@pytest.mark.parametrize("change", ["dropout", "noise", "own generator", "mean of the batch"])
def test_captions_that_are_no_function_of_the_caption(tiny: Models, change: str) -> None:
    column = {"kind": "tokens", "encoder": tiny("gemma"), "max_tokens": 24}
    encoder = load_encoder(CONFIG.validate_python(column), "cpu")
    layer, message = CHANGES[change]
    text = encoder._module
    text.embed_tokens = Changed(text.embed_tokens, layer)
    with pytest.raises(ModelNotUsable, match=message):
        rehearse(encoder, ENGINE)


def test_padding_that_is_attended_to(tmp_path: Path) -> None:
    """FNet mixes all tokens of a row and knows no mask: refused, unless each caption goes alone."""
    fnet = text_model(tmp_path / "m", "FNetModel", SMALL)
    column: dict[str, Any] = {"kind": "tokens", "encoder": fnet, "max_tokens": 24}
    refused("FNetModel gives a caption other values in a batch than alone", **column)
    tried(ENGINE.model_copy(update={"tokens": 1}), **column)


def test_a_tokenizer_with_dropout(tmp_path: Path) -> None:
    """BPE may leave out merges at random; its ids differ each time."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    for dropout in (None, 0.5):
        tokenizer = Tokenizer(models.BPE(dropout=dropout))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<pad>"], initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
        folder = tmp_path / str(dropout)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
            folder
        )
        column = {
            "kind": "ids", "encoder": {"class": "LlamaModel", "path": str(folder)}, "max_tokens": 64
        }  # fmt: skip
        if dropout is None:
            tried(**column)
        else:
            refused("other values each time", **column)


def test_how_far_two_encodings_are_apart() -> None:
    ones = np.ones((3, 4), np.float16)
    assert difference(ones, ones) == 0
    assert difference(ones, ones[:2]) == np.inf
    values = ones.copy()
    values[1] *= 1.5
    assert difference(ones, values) == pytest.approx(0.5)
    values[1] = np.nan
    assert difference(ones, values) > 1
    assert difference(values, values) == 0
    ids = np.arange(3, dtype=np.int32)
    assert difference(ids, ids) == 0
    assert difference(ids, ids + 1) == np.inf
    assert max(TOLERANCE.values()) < 0.18  # what attending to padding does at least


# Captions that say nothing, or say the day --------------------------------------------------------

DATED = [
    "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
    # as Llama 3.2
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}{{ date_string }} {{ messages[0].content }}",
    "{% macro today() %}{{ strftime_now('%H') }}{% endmacro %}{{ today() }}{{ messages[0].content }}",
    "{% set now = strftime_now %}{{ now('%A') }}{{ messages[0].content }}",
    "{{ 'am' if strftime_now('%H')|int < 12 else 'pm' }}{{ messages[0].content }}",
]
UNDATED = [
    "{{ bos_token }}{{ messages[0].content }}",
    "{% if strftime_now is not defined %}old{% endif %}{{ messages[0].content }}",
    # asks for the day only of a conversation without a user
    "{% if not messages %}{{ strftime_now('%d') }}{% endif %}{{ messages[0].content }}",
    # asks for it and writes it into a system prompt, which a caption has not
    "{% set today = strftime_now('%d %b %Y') %}{% if messages[0].role == 'system' %}{{ today }}"
    "{% endif %}{{ messages[0].content }}",
]


@pytest.mark.parametrize("kind", ["ids", "tokens"])
def test_a_chat_template_that_writes_the_day(tmp_path: Path, kind: str) -> None:
    for i, chat in enumerate([*DATED, *UNDATED]):
        model = text_model(tmp_path / f"{kind}{i}", "LlamaModel", GROUPED, chat)
        column = {"kind": kind, "encoder": model, "max_tokens": 24}
        tried(**column)
        if chat in DATED:
            refused("its chat template writes the date", **column, chat_template=True)
        else:
            tried(**column, chat_template=True)


def test_a_template_that_leaves_no_room(tiny: Models) -> None:
    for kind in ("ids", "tokens"):
        for name, least in (("gemma", 18), ("t5", 18), ("clip", 19)):  # with the tokens around
            column: dict[str, Any] = {
                "kind": kind, "encoder": tiny(name), "template": "a photograph of {} in colour"
            }  # fmt: skip
            for most in (least - 1, 8):
                refused("all captions have the same .* Raise max_tokens", **column, max_tokens=most)
            tried(**column, max_tokens=least)
        # what comes on top takes no room
        tried(kind=kind, encoder=tiny("gemma"), instruction="a photograph of ", max_tokens=4)
        refused("all captions have the same", kind=kind, encoder=tiny("gemma"), max_tokens=1)
        refused(
            "makes .* tokens where 1 are asked for", kind=kind, encoder=tiny("clip"), max_tokens=1
        )
        with_chat = {"kind": kind, "encoder": tiny("qwen2"), "chat_template": True}
        tried(**with_chat, max_tokens=1)
        refused("all captions have the same", **with_chat, max_tokens=3, template="a photo of {}")


# The side that is cut off -------------------------------------------------------------------------

# of tokenizers as they were before the side was looked at
MINILM_DIGEST = "afab0b03fcce2430309118f5f51b88379e0d0af3ccfcbb9ca671328131724f1f"
GEMMA_DIGEST = "ebb6e4068c5e03963d1bf648184b532a3eb7b037c4d1d37a30dc490b44f056f7"


def cut_left(tiny: Models, name: str, folder: Path, place: str) -> dict[str, str]:
    """A copy of a model whose tokenizer cuts off the first tokens, as one of its files says."""
    encoder = tiny(name)
    shutil.copytree(encoder["path"], folder)
    if place == "tokenizer_config.json":
        file = folder / place
        file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": "left"}))
    else:
        file = folder / "tokenizer.json"
        truncation = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": truncation}))
    return {**encoder, "path": str(folder)}


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("name", ["gemma", "t5", "clip", "qwen2"])
def test_the_first_tokens_are_kept(tmp_path: Path, tiny: Models, name: str, place: str) -> None:
    encoder = cut_left(tiny, name, tmp_path / "left", place)
    captions = ["a cat sits on the red mat", "a cat", ""]
    column: dict[str, Any] = {"kind": "ids", "max_tokens": 8}
    ordinary, changed = tried(**column, encoder=tiny(name)), tried(**column, encoder=encoder)
    for row, other in zip(ordinary.rows(captions, 99), changed.rows(captions, 99), strict=True):
        assert np.array_equal(row, other)
    assert ordinary.weights != changed.weights  # columns of today hold the last tokens
    tokens = {**column, "kind": "tokens"}
    assert len({tried(**tokens, encoder=e).identity().text.tokenizer
                for e in (tiny(name), encoder)}) == 2  # fmt: skip


def test_a_column_of_the_last_tokens_is_read_as_it_was_made(tmp_path: Path, tiny: Models) -> None:
    spec_left = cut_left(tiny, "gemma", tmp_path / "left", "tokenizer_config.json")
    encoder = tried(kind="ids", encoder=spec_left, max_tokens=8)
    identity = encoder.identity().record()
    assert load_tokenizer(identity)(["a cat sits"]) == [
        encoder.rows(["a cat sits"], 99)[0].tolist()
    ]
    identity["encoder"]["weights"] = tried(kind="ids", encoder=tiny("gemma"), max_tokens=8).weights
    last = load_tokenizer(identity)(["a cat sits"])[0]
    assert last[1:] == encoder._plain("a cat sits")[-7:]


def test_digests_of_ordinary_tokenizers_are_what_they_were(tiny: Models) -> None:
    assert tokenizer(spec("BertModel", MINILM), 8).weights == MINILM_DIGEST
    gemma = tokenizer(spec("GemmaModel", tiny("gemma")["path"]), 8)
    assert gemma.weights == GEMMA_DIGEST


# Nothing is written -------------------------------------------------------------------------------


def test_nothing_is_written_before_the_rehearsal(tmp_path: Path) -> None:
    fnet = text_model(tmp_path / "m", "FNetModel", SMALL)
    values: dict[str, Any] = {
        "root": str(tmp_path / "root"), "sources": {"s": write_source(tmp_path / "tars", 1, 3)},
        "columns": {"t": {"kind": "tokens", "encoder": fnet, "max_tokens": 24, "element": "int8"}},
        "shard_rows": 1024, "engine": ENGINE.model_dump(),
    }  # fmt: skip
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    with pytest.raises(ModelNotUsable, match="in a batch than alone"):
        job.run(EncodeConfig.model_validate(values))
    with pytest.raises(ModelNotUsable, match="in a batch than alone"):
        run_plan(parser.parse_args([str(config)]))
    assert not (tmp_path / "root").exists()


def test_trial_inputs(tiny: Models) -> None:
    noise, grey = pictures(48)
    assert noise.shape == grey.shape == (48, 48, 3)
    long = tokenizer(spec("GemmaModel", tiny("gemma")["path"]), 200)
    assert len(long([long_caption(long)])[0]) == 200
