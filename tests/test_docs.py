"""README and docs: their size, links, errors by name, and commands."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FAMILIES = {  # module and the base of its named errors
    "shards.errors": "ShardsError",
    "encode.errors": "EncodeError",
    "eval.errors": "EvalError",
    "configs": "ConfigError",
    "train.checkpoints.checkpoint": "CheckpointError",
    "train.loop": "NonFiniteLoss",
}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith(("http://", "https://", "#")):
                yield page, target.partition("#")[0]


@pytest.mark.parametrize(("page", "target"), list(links()), ids=lambda value: str(value)[-40:])
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


@pytest.mark.parametrize(("module", "base"), FAMILIES.items())
def test_each_named_error_is_explained(module: str, base: str) -> None:
    names = re.findall(r"`(\w+)`", (ROOT / "docs/troubleshooting.md").read_text())
    family = getattr(importlib.import_module(module), base)
    errors = {cls.__name__ for cls in below(family) if cls.__module__ == module}
    errors |= {base} if not any(cls.__module__ == module for cls in below(family)) else set()
    assert errors - set(names) == set()


def below(cls: type) -> Iterator[type]:
    """Subclasses of a class at any depth."""
    for sub in cls.__subclasses__():
        yield sub
        yield from below(sub)
