"""A text encoder that is handed in from outside and runs in the step, where the text is a column of
ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (ids (T,) int32, cu_seqlens (B + 1,) int32) -> tokens (T, Dt) on the device of the ids; cu_seqlens is on the CPU. An
# attribute `identity`, if it has one, says which encoder it is, in the words of a tokens column: checkpoints record it,
# and it is compared on resume.
TextEncoder = Callable[[Tensor, Tensor], Tensor]


def identity_of(text_encoder: TextEncoder | None) -> dict[str, Any] | None:
    return getattr(text_encoder, "identity", None)


@torch.no_grad()
def encoded(text_encoder: TextEncoder | None, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns packed tokens (T, Dt): ids by way of the encoder, tokens as they are."""
    return tokens if text_encoder is None else text_encoder(tokens, cu_seqlens)
