"""Captions -> token ids."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from shards import canonical_json, sha256
from shards.format import CaptionPreprocess, ColumnIdentity
from shards.format.atomic import Json

from ..config import CaptionColumn, IdsColumn
from ..errors import ModelNotUsable
from ..registry import TEXTS, ModelSpec, location, lookup
from .encoder import CaptionEncoder, Words
from .loading import loading, silent

# Classes whose captions begin with <bos> and end without <eos>, as the reference has them.
BOS_ALONE = {"GemmaModel", "Gemma2Model"}
FEWEST_WORDS = 4  # of a vocabulary; that of a T5 without its file has one
MESSAGE = "latentbank"  # in the place of a caption while a chat template is examined
# They differ in all that a format of strftime can write.
DAYS = datetime(1999, 2, 3, 4, 5, 6, tzinfo=UTC), datetime(2028, 11, 25, 16, 47, 58)
# says at length that SentencePiece is missing, before the error that names it
CONVERTER = "transformers.tokenization_utils_tokenizers"
PROBE = "The quick brown fox: naïve café, 東京 🦊, 12,345.67; don't"


class CaptionTokenizer(CaptionEncoder):
    """Captions -> token ids: template, instruction, chat template and truncation. No model is loaded.

    `max_tokens` is of the caption; an instruction's tokens and those of a chat template come on top
    of it, and the sum is `limit`. `weights` is the digest of what decides the ids. A caption that is
    too long keeps its first tokens, also where the tokenizer's file says `truncation_side: left`; but
    where `expected` is the digest of a column made before that was so, it keeps its last ones.
    """

    config: CaptionColumn

    def __init__(self, config: CaptionColumn, expected: str | None = None) -> None:
        """Loads it; ModelNotUsable if it cannot make tokens as the config says, or if its digest is
        not the `expected` one.
        """
        import transformers

        model = lookup(config.encoder, TEXTS)
        self.config, self.model, self.suffix = config, model, config.caption
        instruction = config.instruction
        if "{}" not in config.template:
            raise ModelNotUsable(
                f"template {config.template!r}: it must hold {{}}, the place of the caption"
            )
        # Right padding as the reference's slow tokenizer; the fast Gemma tokenizer would pad left.
        options = {"subfolder": model.tokenizer} if model.tokenizer else {}
        with (
            loading(model, "no tokenizer can be loaded", "Check path and tokenizer"),
            silent(CONVERTER),
        ):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                location(model.path),
                revision=model.revision,
                padding_side="right",
                trust_remote_code=model.trust_remote_code,
                **options,
            )
        self._refuse_empty()
        self.weights = tokenizer_digest(self._tokenizer)
        if self._tokenizer.truncation_side != "right" and self.weights != expected:
            self.weights = sha256(canonical_json([self.weights, "truncation_side: right"]))
            self._tokenizer.truncation_side = "right"
        if expected is not None:
            _check_digest(model.path, "tokenizer", self.weights, expected)
        self.chat: str | None = None  # digest of the chat template, where it is used
        self._tail: list[int] = []  # what a chat template puts behind the caption
        nothing: list[int] = self._tokenizer("").input_ids
        if model.cls in BOS_ALONE and nothing != [self._tokenizer.bos_token_id]:
            raise ModelNotUsable(
                f'{model.path}: its tokenizer makes {nothing} of "", expected <bos> alone '
                f"({self._tokenizer.bos_token_id}). Restore its files"
            )
        extra = len(self._tokenizer(instruction).input_ids) - len(nothing) if instruction else 0
        if config.chat_template:
            self.chat = sha256(self._template_text().encode())
            head, message, tail = self._rendered(MESSAGE).partition(MESSAGE)
            if not message or MESSAGE in tail:
                raise ModelNotUsable(f"{model.path}: its chat template does not hold the message")
            self._tail = self._plain(tail) if tail else []
            extra += len(self._plain(head)) + len(self._tail) - len(nothing)
        self.limit = config.max_tokens + extra

    def _refuse_empty(self) -> None:
        """Raises ModelNotUsable for what transformers makes where a tokenizer's files are not there: one
        that knows its special tokens alone, and every word by the same one.
        """
        words = set(self._tokenizer.get_vocab()) - set(self._tokenizer.all_special_tokens)
        if len(words) < FEWEST_WORDS:
            raise ModelNotUsable(
                f"{self.model.path}: its tokenizer knows {len(words)} words beside special tokens: its "
                "vocabulary is not there. Bring tokenizer.json, or say tokenizer: SUBFOLDER if it is "
                "in a folder of its own"
            )

    def identity(self) -> ColumnIdentity:
        encoder = tokenizer_spec(self.model).identity(self.weights)
        return ColumnIdentity(
            kind=self.config.kind, preprocess=self.preprocess(), dtype="int32", encoder=encoder
        )

    def preprocess(self, **fields: Any) -> CaptionPreprocess:
        """Returns how captions become tokens. What is not used is not named, so that a column made
        before an option existed is the same column.
        """
        fields |= self.config.model_dump(include={"caption", "template", "max_tokens"})
        if self.config.instruction:
            fields["instruction"] = self.config.instruction
        if self.chat:
            fields["chat_template"] = self.chat
        return CaptionPreprocess(tokenizer=self.weights, **fields)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.limit,)

    def rows(self, captions: Sequence[str], budget: int) -> list[Words]:
        return [np.array(ids, np.int32) for ids in self(captions)]

    def _template_text(self) -> str:
        if not self._tokenizer.chat_template:
            raise ModelNotUsable(
                f"{self.model.path}: its tokenizer has no chat template. Leave chat_template out"
            )
        text = self._tokenizer.get_chat_template()
        return str(text)

    def _rendered(self, message: str, **variables: Any) -> str:
        """Returns the text of a conversation in which the user has sent this, and it is the model's
        turn; `variables` replace those that transformers gives to the template.
        """
        conversation = [{"role": "user", "content": message}]
        text = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **variables
        )
        return str(text)

    @property
    def dated(self) -> bool:
        """Whether tokens depend on the day: its chat template writes other text on another one."""
        if not self.chat:
            return False
        try:
            # the template's one way to the clock, replaced by what cannot be called
            self._rendered(MESSAGE, strftime_now="not a function")
            return False
        except TypeError:
            return len({self._rendered_on(day) for day in DAYS}) > 1

    def _rendered_on(self, day: datetime) -> str:
        """Renders MESSAGE on another day; transformers itself passes no functions to a template."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template: Any = _compile_jinja_template(self._template_text())  # type: ignore[no-untyped-call,unused-ignore]
        text = template.render(
            messages=[{"role": "user", "content": MESSAGE}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            strftime_now=day.strftime,
            **self._tokenizer.special_tokens_map,
        )
        return str(text)

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns token ids with the tokenizer's special tokens, at most `limit` of them. The empty
        caption gets neither template nor instruction.

        A tokenizer that makes nothing of the empty caption (Qwen's) gives its padding token.
        """
        if not captions:
            return []  # a tokenizer takes no empty list
        config = self.config
        texts = [
            config.instruction + config.template.replace("{}", c) if c else "" for c in captions
        ]
        ids: list[list[int]]
        if self.chat:
            ids = [self._cut(self._plain(self._rendered(text))) for text in texts]
        else:
            ids = self._tokenizer(texts, truncation=True, max_length=self.limit).input_ids
        return [row or [self.pad] for row in ids]

    def _cut(self, ids: list[int]) -> list[int]:
        """Removes tokens at the caption's end, so that the template stays closed."""
        if len(ids) <= self.limit:
            return ids
        return ids[: self.limit - len(self._tail)] + self._tail

    def word(self, token: int) -> str:
        """Returns the tokenizer's text of a token."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    @property
    def largest(self) -> int:
        """The largest id that it can make."""
        return max(self._tokenizer.get_vocab().values())

    @property
    def pad(self) -> int:
        """The padding token; <eos> or 0 where a tokenizer has none."""
        named = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return int(next(token for token in named if token is not None))


def load_tokenizer(identity: ColumnIdentity | Json) -> CaptionTokenizer:
    """Returns the tokenizer of a column of ids by its identity, as it was used there, and checked."""
    identity = ColumnIdentity.of(identity)
    config = IdsColumn(
        encoder=ModelSpec.of_identity(identity.encoder), **caption_options(identity.text)
    )
    tokenizer = CaptionTokenizer(config, identity.encoder.weights)
    check_chat(tokenizer, identity.text)
    return tokenizer


def caption_options(preprocess: CaptionPreprocess) -> Json:
    """Returns the fields of a caption column that its identity says, but for the caption."""
    return {
        "max_tokens": preprocess.max_tokens,
        "template": preprocess.template,
        "instruction": preprocess.instruction,
        "chat_template": preprocess.chat_template is not None,
    }


def check_chat(tokenizer: CaptionTokenizer, preprocess: CaptionPreprocess) -> None:
    if tokenizer.chat and preprocess.chat_template:
        path = tokenizer.model.path
        _check_digest(path, "chat template", tokenizer.chat, preprocess.chat_template)


def _check_digest(path: str, name: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise ModelNotUsable(
            f"{path}: the {name} is another than the column's (found {digest:.16}..., expected "
            f"{expected:.16}...). Restore its files, or encode another column"
        )


def tokenizer_spec(model: ModelSpec) -> ModelSpec:
    """Returns what the identity of an ids column says of a model: nothing but where its tokenizer is."""
    return model.model_copy(update={"cls": "AutoTokenizer", "precision": "fp32", "variant": None})


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns the sha256 of the vocabulary and of how a fixed sentence is cut: what decides the ids,
    whatever the layout of its files in this or that version.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return sha256(canonical_json([vocabulary, tokenizer(PROBE).input_ids]))
