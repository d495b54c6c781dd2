"""The measured norm of a run's latents, in each of its checkpoints: what it undoes needs no column.

    checkpoints/step-00000100/norm.safetensors    shift and scale, float64: (C) by channel or (C, H, W) by place

A run with the norm of its columns has no such file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shards import Norm

FILE = "norm.safetensors"


def norm_tensors(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns shift and scale of what a checkpoint records, as they were measured; none of a run that
    has the norm of its columns.
    """
    latents = (record.get("data") or {}).get("latents", {})
    if "measured" not in latents:
        return {}
    norm = Norm(latents["norm"]["shift"], latents["norm"]["scale"])
    return {
        "shift": torch.tensor(norm.shift, dtype=torch.float64),
        "scale": torch.tensor(norm.scale, dtype=torch.float64),
    }


def read_norm(path: Path) -> Norm:
    """Returns the norm in a file of a checkpoint; ValueError where it is none."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if tensors.keys() != {"shift", "scale"}:
        raise ValueError(f"{path.name}: found {sorted(tensors)[:4]}, expected shift and scale")
    shift, scale = (tuple(tensors[name].tolist()) for name in ("shift", "scale"))
    return Norm(shift, scale)
