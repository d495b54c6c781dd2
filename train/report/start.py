"""What a run says when it starts of what follows its latents."""

from __future__ import annotations

from typing import Any

from ..model.config import FlowConfig
from ..model.tokens import Tokens


def latent_lines(flow: FlowConfig, tokens: Tokens) -> list[str]:
    """Returns the lines for the screen."""
    below = (
        " (below 1: less noise than evenly spaced levels have)" if flow.timestep_shift < 1 else ""
    )
    return [
        f"tokens of a picture: {tokens.text}",
        f"noise levels: shift {flow.timestep_shift:.4g}{below}; the model's output is the {flow.prediction}",
    ]


def latent_record(flow: FlowConfig, tokens: Tokens) -> dict[str, Any]:
    """Returns the same for metrics.jsonl."""
    return {
        "shift": flow.timestep_shift, "prediction": flow.prediction, "patch_size": tokens.patch,
        "image_tokens": tokens.count, "token_values": tokens.values, "positions": tokens.positions,
    }  # fmt: skip
