"""A frozen text encoder of transformers: captions -> hidden states of their real tokens only."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shards.format.atomic import Json, canonical_json, sha256

from ..errors import ModelNotUsable
from ..registry import ModelSpec, check_weights, location, one_line
from .weights import autocast, load_model, trying, tune, weights_digest

# Classes whose captions begin with <bos> and end without <eos>, as the reference has them.
BOS_ALONE = {"GemmaModel", "Gemma2Model"}
MESSAGE = "latentbank"  # stands for a caption while a chat template is looked at
# They differ in all that a format of strftime can write.
DAYS = datetime(1999, 2, 3, 4, 5, 6, tzinfo=UTC), datetime(2028, 11, 25, 16, 47, 58)


class CaptionTokenizer:
    """Captions -> token ids: template, instruction, chat template and truncation.

    `max_tokens` is of the caption; an instruction's tokens and those of a chat template come on top
    of it, and the sum is `limit`. `tokenizer` is the digest of what decides the ids. A caption that
    is too long keeps its first tokens, also where the tokenizer's file says `truncation_side: left`;
    but where `expected` is the digest of a column made before that was so, it keeps its last ones.
    """

    def __init__(
        self, model: ModelSpec, *, max_tokens: int, template: str = "{}", instruction: str = "",
        chat_template: bool = False, expected: str | None = None,
    ) -> None:  # fmt: skip
        import transformers

        if "{}" not in template:
            raise ModelNotUsable(
                f"template {template!r}: it must hold {{}}, the place of the caption"
            )
        self.model, self.max_tokens = model, max_tokens
        self.template, self.instruction = template, instruction
        # Right padding as the reference's slow tokenizer; the fast Gemma tokenizer would pad left.
        options = {"subfolder": model.tokenizer} if model.tokenizer else {}
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                location(model.path), revision=model.revision, padding_side="right", **options
            )
        except (OSError, ValueError) as error:
            raise ModelNotUsable(
                f"{model.path}: no tokenizer can be loaded ({one_line(error)})"
            ) from error
        self.tokenizer = tokenizer_digest(self._tokenizer)
        if self._tokenizer.truncation_side != "right" and self.tokenizer != expected:
            self.tokenizer = sha256(canonical_json([self.tokenizer, "truncation_side: right"]))
            self._tokenizer.truncation_side = "right"
        self.chat: str | None = None  # digest of the chat template, where it is used
        self._tail: list[int] = []  # what a chat template puts behind the caption
        nothing: list[int] = self._tokenizer("").input_ids
        if model.cls in BOS_ALONE and nothing != [self._tokenizer.bos_token_id]:
            raise ModelNotUsable(
                f'{model.path}: its tokenizer makes {nothing} of "", expected <bos> alone '
                f"({self._tokenizer.bos_token_id}). Restore its files"
            )
        extra = len(self._tokenizer(instruction).input_ids) - len(nothing) if instruction else 0
        if chat_template:
            self.chat = sha256(self._template_text().encode())
            head, found, tail = self._rendered(MESSAGE).partition(MESSAGE)
            if not found or MESSAGE in tail:
                raise ModelNotUsable(f"{model.path}: its chat template does not hold the message")
            self._tail = self._plain(tail) if tail else []
            extra += len(self._plain(head)) + len(self._tail) - len(nothing)
        self.limit = max_tokens + extra

    def _template_text(self) -> str:
        if not self._tokenizer.chat_template:
            raise ModelNotUsable(
                f"{self.model.path}: its tokenizer has no chat template. Leave chat_template out"
            )
        text = self._tokenizer.get_chat_template()
        return str(text)

    def _rendered(self, message: str, **variables: Any) -> str:
        """The text of a conversation in which the user has said this, and it is the model's turn;
        `variables` take the place of what transformers gives to the template.
        """
        said = [{"role": "user", "content": message}]
        text = self._tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, **variables
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
        """As `_rendered`, of MESSAGE on another day; transformers itself hands no functions on."""
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
        """Token ids with the tokenizer's special tokens, at most `limit` of them. The empty caption
        gets neither template nor instruction.

        A tokenizer that makes nothing of the empty caption (Qwen's) gives its padding token.
        """
        if not captions:
            return []  # a tokenizer takes no empty list
        texts = [self.instruction + self.template.replace("{}", c) if c else "" for c in captions]
        ids: list[list[int]]
        if self.chat:
            ids = [self._cut(self._plain(self._rendered(text))) for text in texts]
        else:
            ids = self._tokenizer(texts, truncation=True, max_length=self.limit).input_ids
        return [row or [self.pad] for row in ids]

    def _cut(self, ids: list[int]) -> list[int]:
        """Tokens are taken from the caption's end, so that the template stays closed."""
        if len(ids) <= self.limit:
            return ids
        return ids[: self.limit - len(self._tail)] + self._tail

    def word(self, token: int) -> str:
        """How the tokenizer writes a token."""
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


class TextEncoder:
    """Tokenizer and language model. `weights` is the digest of the weights."""

    def __init__(
        self, model: ModelSpec, *, max_tokens: int, hidden_state: int = -1, template: str = "{}",
        instruction: str = "", chat_template: bool = False, device: str = "cpu",
        expected: str | None = None, expected_tokenizer: str | None = None, compiled: bool = False,
    ) -> None:  # fmt: skip
        """Load both; ModelNotUsable if the weights are not the `expected` ones."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
        self.model, self.device, self.hidden_state = model, torch.device(device), hidden_state
        self.tokenize = CaptionTokenizer(
            model, max_tokens=max_tokens, template=template, instruction=instruction,
            chat_template=chat_template, expected=expected_tokenizer,
        )  # fmt: skip
        self.tokenizer, self.max_tokens = self.tokenize.tokenizer, max_tokens
        # Gemma: the reference forces tanh GELU, which newer transformers take from the config.
        gemma = {"hidden_act": "gelu_pytorch_tanh"} if model.cls == "GemmaModel" else {}
        self._module = load_model(transformers, model, **gemma)
        self._check()
        self.weights = weights_digest(self._module)
        check_weights(self.weights, expected, model.path)
        self._module.to(self.device)
        tune(self._module, self._module, compiled, last=False)

    def _check(self) -> None:
        """Refuse what loads, but would lie: a pair of towers, or more tokens than were trained."""
        config, path = self._module.config.get_text_config(), self.model.path
        both = hasattr(self._module, "decoder") and self._module.config.is_encoder_decoder
        if hasattr(self._module, "vision_model") or both:
            raise ModelNotUsable(
                f"{path}: {self.model.cls} is not a text encoder alone. Give the class of its text "
                "half, as T5EncoderModel or CLIPTextModel"
            )
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and self.tokenize.limit > most:
            raise ModelNotUsable(
                f"{path}: captions of {self.tokenize.limit} tokens asked for, the model takes "
                f"{most}. Lower max_tokens"
            )

    @cached_property
    def width(self) -> int:
        """Of a hidden state, found by encoding the empty caption; ModelNotUsable if that fails."""
        with trying(f"{self.model.path}: {self.model.cls} cannot encode the empty caption"):
            return int(self.encode([""])[0].shape[1])

    def encode(self, captions: Sequence[str], budget: int = 16_384) -> list[Tensor]:
        """Hidden states (n_i, D) bf16 of each caption, n_i its number of tokens, special ones
        included.

        Captions are sorted by length and batched to at most `budget` tokens, so little padding is
        computed. Right padding does not change the real tokens' values but for rounding.
        """
        ids = self.tokenize(captions)
        out: list[Tensor] = [torch.empty(0)] * len(ids)
        for batch in by_length([len(i) for i in ids], budget):
            states = self._forward([ids[i] for i in batch])
            for i, row in zip(batch, states, strict=True):
                out[i] = row
        return out

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> list[Tensor]:
        longest, pad = max(map(len, ids)), self.tokenize.pad
        if (largest := max(map(max, [*ids, [pad]]))) >= self.vocabulary:
            # on a GPU the model would not say so, but spoil the process
            raise ModelNotUsable(
                f"{self.model.path}: its tokenizer makes the token {largest} "
                f"({self.tokenize.word(largest)!r}), {self.cls} has embeddings of "
                f"{self.vocabulary}. Give the model that the tokenizer belongs to"
            )
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        given = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}
        states = self.states(**given).cpu()
        return [row[: len(i)] for row, i in zip(states, ids, strict=True)]

    def states(self, **given: Any) -> Tensor:
        """The hidden state (rows, tokens, D) bf16 of one forward pass, on the encoder's device."""
        last = self.hidden_state == -1
        with autocast(self.model.precision, self.device):
            output = self._module(**given, output_hidden_states=not last)
        if not hasattr(output, "last_hidden_state"):
            raise ModelNotUsable(
                f"{self.model.path}: {self.model.cls} gives no hidden states but its head's output. "
                "Give the class without the head, as GemmaModel, or AutoModel"
            )
        if last:
            return output.last_hidden_state.to(torch.bfloat16)  # type: ignore[no-any-return]  # transformers is untyped
        every = output.hidden_states or ()
        if not -len(every) <= self.hidden_state < len(every):
            raise ModelNotUsable(
                f"{self.model.path}: hidden state {self.hidden_state} asked for, there are "
                f"{len(every)} (0 the embeddings, -1 the output after the last norm)"
            )
        states = every[self.hidden_state]
        return states.to(torch.bfloat16)  # type: ignore[no-any-return]  # transformers is untyped

    @property
    def cls(self) -> str:
        """The class that was loaded, also where AutoModel was asked for."""
        return type(self._module).__name__

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has an embedding of; without bound where it has no table of them."""
        try:
            table = self._module.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            table = None
        return int(getattr(table, "num_embeddings", sys.maxsize))


def load_text(identity: Json, device: str = "cpu") -> TextEncoder:
    """The text encoder that a tokens column's identity names, its weights and tokenizer checked."""
    how, encoder = identity["preprocess"], identity["encoder"]
    model = ModelSpec.of_identity(encoder)
    return text_of(model, how, how["hidden_state"], device, encoder["weights"])


def load_tokenizer(identity: Json) -> CaptionTokenizer:
    """The tokenizer that an ids column's identity names, as it was used there, and checked."""
    how, encoder = identity["preprocess"], identity["encoder"]
    tokenizer = CaptionTokenizer(
        ModelSpec.of_identity(encoder), max_tokens=how["max_tokens"], template=how["template"],
        instruction=how.get("instruction", ""), chat_template="chat_template" in how,
        expected=encoder["weights"],
    )  # fmt: skip
    check_weights(tokenizer.tokenizer, encoder["weights"], encoder["path"])
    return tokenizer


def text_of(
    model: ModelSpec, how: Json, hidden_state: int, device: str, expected: str | None = None
) -> TextEncoder:
    """A text encoder that reads captions as a column's `preprocess` says; ModelNotUsable if its
    tokenizer or chat template is not the one named there.
    """
    text = TextEncoder(
        model,
        max_tokens=how["max_tokens"],
        hidden_state=hidden_state,
        template=how["template"],
        instruction=how.get("instruction", ""),
        chat_template="chat_template" in how,
        device=device,
        expected=expected,
        expected_tokenizer=how["tokenizer"],
    )
    found = {"tokenizer": text.tokenizer, "chat_template": text.tokenize.chat}
    for name, digest in found.items():
        if digest != how.get(name):
            raise ModelNotUsable(
                f"{model.path}: the {name.replace('_', ' ')} is another than the column's (found "
                f"{digest:.16}..., expected {how[name]:.16}...). Restore its files"
            )
    return text


PROBE = "The quick brown fox: naïve café, 東京 🦊, 12,345.67; don't"


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the vocabulary and of how a fixed sentence is cut: what decides the ids, whatever
    the layout of its files in this or that version.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return sha256(canonical_json([vocabulary, tokenizer(PROBE).input_ids]))


def by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Batches of indices, longest first, with longest * count <= budget (or a single one above
    it).
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
