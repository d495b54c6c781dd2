"""Tensors and settings that the original implementation produced; tests/golden/*.json say how."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from train.model.dit import DiT, DiTConfig

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = json.loads((FOLDER / f"{name}.json").read_text())
    return load_file(FOLDER / f"{name}.safetensors"), settings


def model_of(tensors: dict[str, Tensor], settings: dict[str, Any], prefix: str) -> DiT:
    """The golden's model with the golden's weights."""
    fields = {**settings["dit_config"], "base_config": settings["base_config"]}
    model = DiT(DiTConfig.from_reference(fields))
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return model
