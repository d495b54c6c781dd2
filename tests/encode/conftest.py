"""Models made once, and folders in memory, where a sync takes no time."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.memory import MEMORY, in_memory  # noqa: F401 - a fixture

from .toy import save_gemma, save_kl, save_qwen


@pytest.fixture(scope="session")
def models() -> Iterator[Path]:
    """A folder with `kl`, `other-kl` (the same but for the weights), `qwen` and `gemma`."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        save_kl(folder / "kl")
        save_kl(folder / "other-kl", seed=1)
        save_qwen(folder / "qwen")
        save_gemma(folder / "gemma")
        yield folder
