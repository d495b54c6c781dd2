"""Folders in memory for tests that write columns: a sync takes 30 ms on a busy disk, and none there."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # None: where others are

_kept: list[tempfile.TemporaryDirectory[str]] = []


def kept(folder: str | Path | None = MEMORY) -> Path:
    """A new folder there, which goes with this process."""
    _kept.append(tempfile.TemporaryDirectory(dir=folder, prefix="kept-"))
    return Path(_kept[-1].name)


@pytest.fixture(name="tmp_path")
def in_memory() -> Iterator[Path]:
    """In place of pytest's own, where a conftest imports it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)
        for (
            thread
        ) in threading.enumerate():  # what a reader of a store asked for may still be written
            if thread.name == "latentbank-fetch":
                thread.join(60)
