"""The demo's pictures, drawn once for all tests of this folder."""

from pathlib import Path

import pytest

from eval.demo.data import draw


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python -m eval.demo.data` fills."""
    out = tmp_path_factory.mktemp("data")
    draw(out)
    return out
