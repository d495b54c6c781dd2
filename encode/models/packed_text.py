"""A text encoder inside the training step: packed token ids in, packed hidden states out.

    ids          a a a b b c c c c d           captions back to back
    rows         [c c c c b b] [a a a d . .]   as many whole captions a row as fit, the longest first
    positions     0 1 2 3 0 1   0 1 2 0 0 1    transformers masks attention across where they restart

So hardly a padding token is computed. A class whose attention is not masked so (T5, CLIP, BERT) gets
one caption a row, in batches of similar length, with a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.format import CaptionPreprocess, ColumnIdentity, EncoderIdentity
from shards.format.atomic import Json

from ..errors import ModelNotUsable
from ..registry import TEXTS, ModelSpec
from .rehearsal import long_caption
from .text import TextEncoder, by_length, load_text, load_text_as
from .tokenizer import tokenizer_spec
from .weights import trying

# classes whose causal mask transformers makes from `position_ids`
CUT = {"GemmaModel", "Gemma2Model", "Qwen2Model", "Qwen3Model"}
ROW = 1_024  # tokens; attention within a row costs 3 % of Gemma-2B's multiplications at that length
PASS = 16_384  # tokens of a forward pass, padding included
SIMILAR = 2_048  # tokens of a batch of similar captions, where each has a row of its own

Ints = NDArray[np.int64]


class PackedText:
    """(ids (T,) int32, cu_seqlens (B + 1,)) -> hidden states (T, D) bf16, on the device of the ids: the
    values of a tokens column. `identity` is that of such a column, but for source and caption.
    """

    def __init__(self, text: TextEncoder, identity: ColumnIdentity | Json) -> None:
        self.text, column = text, ColumnIdentity.of(identity)
        record = column.text.record()
        record.pop("caption", None)  # of no matter to the values
        self.identity: Json = ColumnIdentity(
            kind="tokens", dtype="bfloat16", encoder=column.encoder,
            preprocess=CaptionPreprocess.of(record),
        ).record()  # fmt: skip

    @classmethod
    def of_tokens(cls, identity: ColumnIdentity | Json, device: str = "cpu") -> PackedText:
        """Returns the encoder of a tokens column."""
        return cls(load_text(identity, device), identity)

    @classmethod
    def of_ids(
        cls, identity: ColumnIdentity | Json, model: ModelSpec | None = None, hidden_state: int = -1,
        device: str = "cpu",
    ) -> PackedText:  # fmt: skip
        """Returns an encoder for an ids column, whose identity names a tokenizer: `model`, or else the
        model of the registry that has it. ModelNotUsable if its tokenizer is another.
        """
        column = ColumnIdentity.of(identity)
        model = model or model_of(column.encoder)
        text = load_text_as(model, column.text, hidden_state, device)
        if text.vocabulary <= text.tokenizer.largest:
            raise ModelNotUsable(
                f"{model.path}: its tokenizer makes ids up to {text.tokenizer.largest}, {text.cls} has "
                f"embeddings of {text.vocabulary}. Give the model that the tokenizer belongs to"
            )
        limit = text.tokenizer.limit
        with trying(
            f"{model.path}: {text.cls} cannot encode captions of up to {limit} tokens, as the column has"
        ):
            text.encode([long_caption(text.tokenizer), ""])
        preprocess = column.text.model_copy(update={"hidden_state": hidden_state})
        encoder = model.identity(text.weights)
        return cls(text, ColumnIdentity(preprocess=preprocess, encoder=encoder))

    @torch.no_grad()
    def __call__(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        device = self.text.device
        device_ids = ids.to(device, torch.long)
        ends = cu_seqlens.cpu().numpy().astype(np.int64)  # on a GPU this would wait for it
        out = torch.empty(len(ids), self.text.width, dtype=torch.bfloat16, device=device)
        packed = self.text.cls in CUT
        for rows in packed_rows(np.diff(ends)) if packed else similar_rows(np.diff(ends)):
            token, position = (torch.from_numpy(a).to(device) for a in token_places(rows, ends))
            mask = token >= 0
            inputs: Json = {"attention_mask": mask.long()}
            if packed:  # a cache would bring another mask
                inputs = {"position_ids": position, "use_cache": False}
            states = self.text.states(input_ids=device_ids[token.clamp(min=0)], **inputs)
            out[token[mask]] = states[mask]
        return out.to(ids.device)


def model_of(encoder: EncoderIdentity) -> ModelSpec:
    """Returns the registry's model that has the tokenizer of an ids column."""
    for model in TEXTS.values():
        if tokenizer_spec(model).identity(encoder.weights).record() == encoder.record():
            return model
    raise ModelNotUsable(
        f"{encoder.path}: no model of the registry has this tokenizer. Say which one the ids are "
        "for, as data.encoder={class: GemmaModel, path: FOLDER}"
    )


# Layout ------------------------------------------------------------------------------------------


def packed_rows(lengths: Ints) -> Iterator[list[list[int]]]:
    """Yields passes of rows of captions, each caption once: the longest first, into the first row that
    has room (first fit decreasing); captions without tokens are left out.
    """
    width = max(ROW, int(lengths.max(initial=0)))
    rows: list[list[int]] = []
    free: list[int] = []  # tokens of each row
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if not n:
            break
        r = next((r for r, tokens in enumerate(free) if tokens >= n), len(rows))
        if r == len(rows):
            rows.append([])
            free.append(width)
        rows[r].append(i)
        free[r] -= n
    count = max(1, PASS // width)
    for start in range(0, len(rows), count):
        yield rows[start : start + count]


def similar_rows(lengths: Ints) -> Iterator[list[list[int]]]:
    """Yields passes of one-caption rows of similar lengths; captions without tokens are left out."""
    captions = np.flatnonzero(lengths)
    for batch in by_length(lengths[captions].tolist(), SIMILAR):
        yield [[int(captions[i])] for i in batch]


def token_places(rows: Sequence[Sequence[int]], ends: Ints) -> tuple[Ints, Ints]:
    """Returns two arrays (rows, longest): the index of each place's token, -1 for padding, and its
    position in its caption. The padding of a row counts as a caption of its own.
    """
    longest = max(int(sum(ends[i + 1] - ends[i] for i in row)) for row in rows)
    token = np.full((len(rows), longest), -1, np.int64)
    position = np.empty((len(rows), longest), np.int64)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            n = int(ends[i + 1] - ends[i])
            token[r, at : at + n] = np.arange(ends[i], ends[i + 1])
            position[r, at : at + n] = np.arange(n)
            at += n
        position[r, at:] = np.arange(longest - at)
    return token, position
