"""What commands print: tables and lines as plain text, and JSON that any reader takes."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console

WIDTH = 118  # characters


def render(*parts: Any, width: int = WIDTH) -> str:
    """Tables and lines as plain text."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False
    )  # fmt: skip
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def without_nan(value: Any) -> Any:
    """NaN and infinity are no JSON: null stands for them."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
