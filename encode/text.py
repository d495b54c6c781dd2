"""A frozen text encoder of transformers: captions -> hidden states of their real tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shards.storage import Json, canonical_json, sha256

from .errors import ModelNotUsable
from .registry import ModelSpec, autocast, check_weights, load_model, location, weights_digest


class TextEncoder:
    """Tokenizer and language model. `weights` is the digest of the weights, `width` that of a
    hidden state.
    """

    def __init__(
        self, model: ModelSpec, *, max_tokens: int, hidden_state: int = -1, template: str = "{}",
        device: str = "cpu", expected: str | None = None,
    ) -> None:  # fmt: skip
        """Load both; ModelNotUsable if the weights are not the `expected` ones."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
        if "{}" not in template:
            raise ModelNotUsable(
                f"template {template!r}: it must hold {{}}, the place of the caption"
            )
        self.model, self.device = model, torch.device(device)
        self.max_tokens, self.hidden_state, self.template = max_tokens, hidden_state, template
        # Right padding as the reference's slow tokenizer; the fast Gemma tokenizer would pad left.
        path = location(model.path)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, revision=model.revision, padding_side="right"
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelNotUsable(f"{model.path}: no tokenizer can be loaded ({reason})") from error
        # Gemma: the reference forces tanh GELU, which newer transformers take from the config.
        gemma = {"hidden_act": "gelu_pytorch_tanh"} if model.cls == "GemmaModel" else {}
        self.tokenizer = tokenizer_digest(self._tokenizer)
        self._module = load_model(transformers, model, **gemma)
        self.weights = weights_digest(self._module)
        check_weights(self.weights, expected, model.path)
        self.width = int(self._module.config.hidden_size)
        self._module.to(self.device)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids with the tokenizer's special tokens, cut at `max_tokens`. The empty caption
        gets no template.
        """
        texts = [self.template.replace("{}", c) if c else "" for c in captions]
        ids: list[list[int]] = self._tokenizer(
            texts, truncation=True, max_length=self.max_tokens
        ).input_ids
        return ids

    def encode(self, captions: Sequence[str], budget: int = 16_384) -> list[Tensor]:
        """Hidden states (n_i, D) bf16 of each caption, n_i its number of tokens, special ones
        included.

        Captions are sorted by length and batched to at most `budget` tokens, so little padding is
        computed. Right padding does not change the real tokens' values but for rounding.
        """
        ids = self.tokenize(captions) if captions else []  # a tokenizer takes no empty list
        out: list[Tensor] = [torch.empty(0)] * len(ids)
        for batch in by_length([len(i) for i in ids], budget):
            states = self._forward([ids[i] for i in batch])
            for i, row in zip(batch, states, strict=True):
                out[i] = row
        return out

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> list[Tensor]:
        longest = max(map(len, ids))
        pad = self._tokenizer.pad_token_id or 0
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        last = self.hidden_state == -1
        with autocast(self.model.precision, self.device):
            output = self._module(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                output_hidden_states=not last,
            )
        states = output.last_hidden_state if last else output.hidden_states[self.hidden_state]
        states = states.to(torch.bfloat16).cpu()
        return [row[: len(i)] for row, i in zip(states, ids, strict=True)]


def load_text(identity: Json, device: str = "cpu") -> TextEncoder:
    """The text encoder that a tokens column's identity names, its weights and tokenizer checked."""
    how, encoder = identity["preprocess"], identity["encoder"]
    text = TextEncoder(
        ModelSpec.of_identity(encoder),
        max_tokens=how["max_tokens"],
        hidden_state=how["hidden_state"],
        template=how["template"],
        device=device,
        expected=encoder["weights"],
    )
    if text.tokenizer != how["tokenizer"]:
        raise ModelNotUsable(
            f"{encoder['path']}: the weights are those of the column, the tokenizer is another "
            f"(found {text.tokenizer[:16]}..., expected {how['tokenizer'][:16]}...). Restore its files"
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
