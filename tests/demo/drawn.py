"""The demo's pictures, drawn once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.demo.data import draw
from tests.once import once


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python -m eval.demo.data` fills."""
    return once(tmp_path_factory, "drawn", draw)
