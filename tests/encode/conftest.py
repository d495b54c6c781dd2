"""Models made once, and folders in memory, where a sync takes no time."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .toy import save_gemma, save_kl, save_qwen

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


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
