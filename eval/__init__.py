"""Prompts in, images out, scores with their uncertainty: sample, reconstruct and compare.

Public names; importing `eval` or `eval.score` loads no torch:

    from eval import Request, generate        pictures of prompts: generate(Request(...))
    from eval.score import SCORERS, run       scorers by name, and the scores of finished sets
    from eval.report.report import report     sets and their scores on one page
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .images.generate import generate
    from .images.generator import Request

__all__ = ["Request", "generate"]

_MODULES = {"generate": "images.generate", "Request": "images.generator"}


def __getattr__(name: str) -> Any:
    """Loads what needs torch when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
