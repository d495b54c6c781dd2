"""Two columns of one source, written once by the real writer, and folders in memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .toy import moments_spec, tokens_spec, write_column

# Writers sync every object; on a busy disk a sync takes 30 ms, in memory none.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def toy() -> Iterator[Path]:
    """A folder with the columns `vae` and `text`. Read only: tests that damage one make their own."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        write_column(Path(name) / "vae", moments_spec())
        write_column(Path(name) / "text", tokens_spec())
        yield Path(name)
