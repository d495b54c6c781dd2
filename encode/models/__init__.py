"""Frozen encoders: pictures or captions in, rows of a column out."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ColumnConfig, EngineConfig
from .encoder import Encoder


def load_encoders(
    columns: Mapping[str, ColumnConfig], engine: EngineConfig,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Encoder]:  # fmt: skip
    """Calls `load`, which is imported here: torch takes seconds, and most verbs load no model."""
    from . import load

    return load.load_encoders(columns, engine, weights)
