"""SOAK.md: what was run, on what, and what came of it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from .registry import SWEEPS
from .runner import ROOT, code, shown
from .sweep import Outcome

HEAD = """# The soak run

By `make soak`. Where fewer cases were run than there are, they were drawn by chance. A case is one
distinct cause (a system call and what is done at it, a byte, a length, a pair of files), never a
repetition; where inputs are drawn by chance, equal ones are counted once. `make test` runs a sample
of each sweep.

| | |
|---|---|
"""


def machine() -> dict[str, str]:
    """What the run was made on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    packages = ("numpy", "zarr", "numcodecs", "google-crc32c", "hypothesis")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit.stdout.strip() + (", with changes" if dirty.stdout.strip() else ""),
        "code": code(),
        "machine": f"{cpu}, {os.cpu_count()} cores, {memory} GiB, {platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
        ),
    }


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The sums, a row a sweep."""
    lines = [
        "| sweep | a case is | cases | distinct causes | kinds | failures | seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, outcome in outcomes.items():
        inputs = len(outcome.inputs)
        distinct = len(set(outcome.inputs)) if inputs else outcome.cases
        lines.append(
            f"| {name} | {SWEEPS[name].counts} | {outcome.cases:,} of {len(SWEEPS[name].cases()):,} "
            f"| {distinct:,} "
            f"| {len(outcome.groups)} | {len(outcome.failures)} | {outcome.seconds:,.0f} |"
        )
    return "\n".join(lines)


def text(outcomes: Mapping[str, Outcome]) -> str:
    """All of SOAK.md."""
    parts = [HEAD + "\n".join(f"| {k} | {v} |" for k, v in machine().items()), table(outcomes)]
    failures = [
        f"- `python -m tests.soak --case {name} '{shown(case)}'`: {why.splitlines()[0][:300]}"
        for name, outcome in outcomes.items()
        for case, why in outcome.failures
    ]
    if failures:
        parts.append("## Failures\n" + "\n".join(failures))
    parts.append("## Kinds of causes, and how many of each")
    for name, outcome in outcomes.items():
        groups = ", ".join(f"{group} {count:,}" for group, count in sorted(outcome.groups.items()))
        parts.append(f"**{name}**: {groups}.")
    return "\n\n".join(parts) + "\n"
