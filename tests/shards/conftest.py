"""Two columns of one source, written once by the real writer, and folders in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.memory import MEMORY, in_memory  # noqa: F401 - a fixture
from tests.shards.toy import moments_spec, tokens_spec, write_column


@pytest.fixture(scope="session")
def toy() -> Iterator[Path]:
    """A folder with the columns `vae` and `text`. Read only: tests that damage one make their own."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        write_column(Path(name) / "vae", moments_spec())
        write_column(Path(name) / "text", tokens_spec())
        yield Path(name)
