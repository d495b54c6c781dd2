"""Models made once, and folders in memory, where a sync takes no time."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.encode.tiny_models import Models
from tests.encode.toy import save_gemma, save_kl, save_qwen
from tests.memory import MEMORY, in_memory  # noqa: F401 - a fixture

# Ray looks at these when it is imported; every cluster of these tests asks for the token.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_AUTH_MODE"] = "token"


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


@pytest.fixture(scope="session")
def tiny() -> Iterator[Models]:
    """A tiny random model of any family: `tiny("t5")` is the `encoder` of a column's config."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Models(Path(name))
