"""Prompts in, images out, scores with their uncertainty: sample, reconstruct and compare.

Public names; importing `eval` or `eval.score` loads no torch:

    from eval import Request, generate        pictures of prompts: generate(Request(...))
    from eval.score import SCORERS, run       scorers by name, and the scores of finished sets
    from eval.report.report import report     sets and their scores on one page
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

if TYPE_CHECKING:
    from .images.generate import generate
    from .images.generator import Request
else:
    __getattr__ = lazy_getattr(
        __name__, {"images.generate": ("generate",), "images.generator": ("Request",)}
    )

__all__ = ["Request", "generate"]
