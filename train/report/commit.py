"""Which commit of this repository a run trains with."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit(root: Path = ROOT) -> str | None:
    """Returns the commit of the code below `root`, with "-dirty" where tracked files are changed; None
    where that is no clone of its own (an installed package) or git is missing.
    """
    if not (root / ".git").exists():  # else git would name a repository around an installation
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
