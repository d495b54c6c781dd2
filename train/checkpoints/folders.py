"""The folders of a run's steps, by their names alone: loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

STEP = re.compile(r"step-(\d{8,})")


def number_of(folder: Path) -> int | None:
    """Returns the step that a folder is of; None of another name, as step-00000100.old, which is a person's."""
    match = STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def steps(folder: Path) -> list[Path]:
    """Returns a run's step folders, newest first."""
    numbers = {path: number_of(path) for path in folder.glob("step-*") if path.is_dir()}
    named = [(number, path) for path, number in numbers.items() if number is not None]
    return [path for _, path in sorted(named, reverse=True)]
