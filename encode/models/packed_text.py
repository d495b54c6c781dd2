"""A text encoder inside the training step: packed token ids in, packed hidden states out.

    ids          a a a b b c c c c d           captions back to back
    rows         [c c c c b b] [a a a d . .]   as many whole captions a row as fit, the longest first
    positions     0 1 2 3 0 1   0 1 2 0 0 1    transformers lets no attention pass where they start again

So hardly a padding token is computed. A class whose attention is not cut so (T5, CLIP, BERT) gets
one caption a row, in batches of similar length, with a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.format.atomic import Json
from shards.format.identity import CaptionPreprocess, ColumnIdentity, EncoderIdentity

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
    """(ids (T,) int32, cu_seqlens (B + 1,)) -> hidden states (T, D) bf16, on the device of the ids: what a
    tokens column would hold. `identity` is that of such a column, but for source and caption.
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
        """An encoder for an ids column, whose identity names a tokenizer: `model`, or else the model of
        the registry that has it. ModelNotUsable if its tokenizer is another.
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
        given, device = ids.to(self.text.device, torch.long), self.text.device
        ends = cu_seqlens.cpu().numpy().astype(np.int64)  # on a GPU this would wait for it
        out = torch.empty(len(ids), self.text.width, dtype=torch.bfloat16, device=device)
        cut = self.text.cls in CUT
        for rows in packed_rows(np.diff(ends)) if cut else similar_rows(np.diff(ends)):
            token, position = (torch.from_numpy(a).to(device) for a in laid_out(rows, ends))
            there = token >= 0
            row_ids = given[token.clamp(min=0)]
            more = (
                {"position_ids": position, "use_cache": False}  # a cache would keep masks uncut
                if cut
                else {"attention_mask": there.long()}
            )
            out[token[there]] = self.text.states(input_ids=row_ids, **more)[there]
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
    """Passes of rows of captions, each caption once: the longest first, into the first row that has
    room; captions without tokens are left out.
    """
    room = max(ROW, int(lengths.max(initial=0)))
    rows: list[list[int]] = []
    left: list[int] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if not n:
            break
        at = next((r for r, free in enumerate(left) if free >= n), len(rows))
        if at == len(rows):
            rows.append([])
            left.append(room)
        rows[at].append(i)
        left[at] -= n
    several = max(1, PASS // room)
    for start in range(0, len(rows), several):
        yield rows[start : start + several]


def similar_rows(lengths: Ints) -> Iterator[list[list[int]]]:
    """Passes of rows of one caption, of similar lengths; captions without tokens are left out."""
    there = np.flatnonzero(lengths)
    for batch in by_length(lengths[there].tolist(), SIMILAR):
        yield [[int(there[i])] for i in batch]


def laid_out(rows: Sequence[Sequence[int]], ends: Ints) -> tuple[Ints, Ints]:
    """(rows, longest) which token stands there, -1 where none does, and its position in its caption.
    What fills a row up counts as a caption of its own.
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
