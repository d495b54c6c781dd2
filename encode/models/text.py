"""A frozen text encoder of transformers: captions -> hidden states of their real tokens only."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.format import CaptionPreprocess, ColumnIdentity
from shards.format.atomic import Json

from ..config import TokensColumn
from ..errors import ModelNotUsable
from ..registry import ModelSpec
from .encoder import CaptionEncoder, Words
from .pixels import bf16_words
from .tokenizer import CaptionTokenizer, caption_options, check_chat
from .weights import autocast, load_model, trying, tune


class TextEncoder(CaptionEncoder):
    """Tokenizer and language model. `weights` is the digest of the model's weights."""

    config: TokensColumn

    def __init__(
        self, config: TokensColumn, device: str = "cpu", expected: str | None = None, *,
        expected_tokenizer: str | None = None, compiled: bool = False,
    ) -> None:  # fmt: skip
        """Loads both; ModelNotUsable if a digest is not the `expected` one."""
        self.config, self.suffix, self.device = config, config.caption, torch.device(device)
        self.tokenizer = CaptionTokenizer(config, expected_tokenizer)
        self.model = model = self.tokenizer.model
        # Gemma: the reference forces tanh GELU, which newer transformers take from the config.
        gemma: Json = {"hidden_act": "gelu_pytorch_tanh"} if model.cls == "GemmaModel" else {}
        self._module, self.weights = load_model(
            "transformers", model, device, expected=expected, **gemma
        )
        self._check()
        tune(self._module, self._module, compiled, last=False)

    def _check(self) -> None:
        """Refuses what loads, but would lie: a pair of towers, or more tokens than were trained."""
        config, path = self._module.config.get_text_config(), self.model.path
        decoder = hasattr(self._module, "decoder") and self._module.config.is_encoder_decoder
        if hasattr(self._module, "vision_model") or decoder:
            raise ModelNotUsable(
                f"{path}: {self.model.cls} is not a text encoder alone. Give the class of its text "
                "half, as T5EncoderModel or CLIPTextModel"
            )
        most = getattr(config, "max_position_embeddings", None)
        # XLNet's positions are relative: it says -1
        if most is not None and 0 < most < self.tokenizer.limit:
            raise ModelNotUsable(
                f"{path}: captions of {self.tokenizer.limit} tokens asked for, the model takes "
                f"{most}. Lower max_tokens"
            )

    def preprocess(self) -> CaptionPreprocess:
        return self.tokenizer.preprocess(hidden_state=self.config.hidden_state)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.tokenizer.limit, self.width

    def lengths(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Asks the tokenizer alone; the model does not run."""
        return self.tokenizer.lengths(captions)

    def rows(self, captions: Sequence[str], budget: int) -> list[Words]:
        return [bf16_words(states) for states in self.encode(captions, budget)]

    @cached_property
    def width(self) -> int:
        """Of a hidden state of the empty caption; ModelNotUsable if it cannot be encoded."""
        with trying(f"{self.model.path}: {self.model.cls} cannot encode the empty caption"):
            return int(self.encode([""])[0].shape[1])

    def encode(self, captions: Sequence[str], budget: int = 16_384) -> list[Tensor]:
        """Returns hidden states (n_i, D) bf16 of each caption, n_i its number of tokens with special
        ones.

        Captions are sorted by length and batched to at most `budget` tokens, so little padding is
        computed. Right padding does not change the real tokens' values but for rounding.
        """
        ids = self.tokenizer(captions)
        out: list[Tensor] = [torch.empty(0)] * len(ids)
        for batch in by_length([len(i) for i in ids], budget):
            states = self._forward([ids[i] for i in batch])
            for i, row in zip(batch, states, strict=True):
                out[i] = row
        return out

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> list[Tensor]:
        longest, pad = max(map(len, ids)), self.tokenizer.pad
        if (largest := max(map(max, [*ids, [pad]]))) >= self.vocabulary:
            # on a GPU the model would not say so, but spoil the process
            raise ModelNotUsable(
                f"{self.model.path}: its tokenizer makes the token {largest} "
                f"({self.tokenizer.word(largest)!r}), {self.cls} has embeddings of "
                f"{self.vocabulary}. Give the model that the tokenizer belongs to"
            )
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        states = self.states(
            input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)
        ).cpu()
        return [row[: len(i)] for row, i in zip(states, ids, strict=True)]

    def states(self, **inputs: Any) -> Tensor:
        """Returns the hidden state (rows, tokens, D) bf16 of one forward pass, on its device."""
        index = self.config.hidden_state
        last = index == -1
        with autocast(self.model.precision, self.device):
            output = self._module(**inputs, output_hidden_states=not last)
        if not hasattr(output, "last_hidden_state"):
            raise ModelNotUsable(
                f"{self.model.path}: {self.model.cls} gives no hidden states but its head's output. "
                "Give the class without the head, as GemmaModel, or AutoModel"
            )
        if last:
            return output.last_hidden_state.to(torch.bfloat16)  # type: ignore[no-any-return]  # transformers is untyped
        layers = output.hidden_states or ()
        if not -len(layers) <= index < len(layers):
            raise ModelNotUsable(
                f"{self.model.path}: hidden state {index} asked for, there are "
                f"{len(layers)} (0 the embeddings, -1 the output after the last norm)"
            )
        return layers[index].to(torch.bfloat16)  # type: ignore[no-any-return]  # transformers is untyped

    @property
    def cls(self) -> str:
        """The class that was loaded, also where AutoModel was asked for."""
        return type(self._module).__name__

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model has an embedding of; without bound where it has no table
        of them.
        """
        try:
            table = self._module.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            table = None
        return int(getattr(table, "num_embeddings", sys.maxsize))


def load_text(identity: ColumnIdentity | Json, device: str = "cpu") -> TextEncoder:
    """Returns the text encoder of a tokens column's identity, its weights and tokenizer checked."""
    identity = ColumnIdentity.of(identity)
    model, preprocess = ModelSpec.of_identity(identity.encoder), identity.text
    return load_text_as(
        model, preprocess, preprocess.hidden_state, device, identity.encoder.weights
    )


def load_text_as(
    model: ModelSpec, preprocess: CaptionPreprocess, hidden_state: int, device: str,
    expected: str | None = None,
) -> TextEncoder:  # fmt: skip
    """Returns a text encoder that reads captions as a column's `preprocess` says; ModelNotUsable if its
    tokenizer or chat template is not the one named there.
    """
    config = TokensColumn(encoder=model, hidden_state=hidden_state, **caption_options(preprocess))
    text = TextEncoder(config, device, expected, expected_tokenizer=preprocess.tokenizer)
    check_chat(text.tokenizer, preprocess)
    return text


def by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yields batches of indices, longest first, with longest * count <= budget, or a single index above
    it.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
