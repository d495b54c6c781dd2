"""What several files of tests need and takes long to make: made by one of xdist's processes, and used by all."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, to be read only; it is empty and there when `make` is called."""
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            half = own / f"half-{name}"
            half.mkdir()
            make(half)
            half.rename(root / name)
    return root / name
