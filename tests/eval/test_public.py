"""The names that scripts import from eval, and that they cost no import of torch."""

import subprocess
import sys

import pytest

from eval import Request, generate
from eval.images import generate as module


@pytest.mark.parametrize("name", ["eval", "eval.score"])
def test_modules_load_no_torch(name: str) -> None:
    code = f"import sys, {name}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_generate_is_the_function() -> None:
    assert generate is module.generate
    assert Request is module.Request
    with pytest.raises(ImportError):
        from eval import nothing  # type: ignore[attr-defined]  # noqa: F401
