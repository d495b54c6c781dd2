"""Models that judge pictures, by hub name or folder: no weight is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from encode.errors import ModelNotUsable
from encode.models import load_model
from encode.registry import ModelSpec, location, one_line

from ..errors import MissingWeights


def model(cls: str, path: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """Returns a frozen model of a class of transformers, and the digest of its weights."""
    try:
        spec = ModelSpec.model_validate({"class": cls, "path": path})
        return load_model("transformers", spec, device, dtype=dtype)
    except (ModelNotUsable, ImportError) as error:
        raise _missing(path, f"{error}") from error


def part(cls: str, path: str) -> Any:
    """Returns a model's tokenizer or processor; `cls` is a class that chooses by the model's files, and
    would else ask on the terminal whether code that comes with it may run.
    """
    import transformers

    try:
        return getattr(transformers, cls).from_pretrained(location(path), trust_remote_code=False)
    except (
        ModelNotUsable, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError,
    ) as error:  # fmt: skip
        raise _missing(path, f"{path}: cannot be loaded as {cls} ({one_line(error)})") from error


def damaged(path: Path, source: str, error: Exception) -> MissingWeights:
    """Returns what is said of a file of weights that exists and cannot be loaded."""
    return MissingWeights(
        f"{path}: not the weights that are expected, or cut off ({one_line(error)}). Fetch {source} again"
    )


def _missing(path: str, problem: str) -> MissingWeights:
    name = path if path.count("/") == 1 and not path.startswith(".") else "OWNER/NAME"
    return MissingWeights(
        f"{problem}. `hf download {name} --local-dir FOLDER` brings a model to a machine with a network; copy "
        "the folder here, and name it (--model, --vlm, --detector, --clip). There is no such score without it"
    )
