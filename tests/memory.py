"""Folders in memory for tests that write columns: a sync takes 30 ms on a busy disk, and none there."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # None: where others are


@pytest.fixture(name="tmp_path")
def in_memory() -> Iterator[Path]:
    """In place of pytest's own, where a conftest imports it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)
