"""Models that judge pictures, by hub name or folder, checked as they are loaded: no weight may be made up."""

from typing import Any

import torch

from encode.errors import ModelNotUsable
from encode.models.weights import hushed, weights_digest
from encode.registry import location, one_line

from ..errors import MissingWeights


def model(cls: str, path: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """A frozen model of a class of transformers, and the digest of its weights; else MissingWeights."""
    import transformers

    with hushed(transformers):
        module, report = _from_pretrained(
            cls, path, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if absent := sorted(report["missing_keys"]):
        raise MissingWeights(
            f"{path}: {len(absent)} weights of {cls} are not in it, {absent[:3]} among them. Check that it is the "
            "whole model, and of this class"
        )
    return module.eval().requires_grad_(False).to(device), weights_digest(module)


def part(cls: str, path: str, **options: Any) -> Any:
    """A model's tokenizer or processor."""
    return _from_pretrained(cls, path, **options)


def _from_pretrained(cls: str, path: str, **options: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, cls).from_pretrained(location(path), **options)
    except (
        ModelNotUsable, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError,
    ) as error:  # fmt: skip
        name = path if path.count("/") == 1 and not path.startswith(".") else "OWNER/NAME"
        raise MissingWeights(
            f"{path}: cannot be loaded as {cls} ({one_line(error)}). `hf download {name}` brings a model to this "
            "machine from the hub; or give the folder where it lies"
        ) from error
