"""SOAK.md: what was run, on what, and what came of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.soak.registry import SWEEPS
from tests.soak.runner import ROOT, code, shown
from tests.soak.sweep import Outcome

HEAD = """# The soak run

By `make soak`. Where fewer cases were run than there are, they were drawn by chance. A case is one
distinct cause (a system call and what is done at it, a byte, a length, a pair of files), never a
repetition; where inputs are drawn by chance, equal ones are counted once. `make test` runs a sample
of each sweep; `kernels` runs the tests of `make test`. A sweep that is run by itself replaces its own
lines; the first table describes the last run.

| | |
|---|---|
"""
TABLE = """| sweep | a case is | cases | distinct causes | kinds | failures | seconds | commit | date (UTC) |
|---|---|--:|--:|--:|--:|--:|---|---|"""


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
        [*git, "status", "--porcelain", "--untracked-files=no", ":!/SOAK.md"],
        capture_output=True,
        text=True,
    )
    packages = ("numpy", "scipy", "torch", "zarr", "numcodecs", "google-crc32c", "hypothesis")
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
    return "\n".join([TABLE, *(row(*item) for item in outcomes.items())])


def row(name: str, outcome: Outcome) -> str:
    ran = machine()
    distinct = len(set(outcome.inputs)) if outcome.inputs else outcome.cases
    return (
        f"| {name} | {SWEEPS[name].counts} | {outcome.cases:,} of {len(SWEEPS[name].cases()):,} | {distinct:,} "
        f"| {len(outcome.groups)} | {len(outcome.failures)} | {outcome.seconds:,.0f} | {ran['commit']} "
        f"| {ran['date'].removesuffix(' UTC')} |"
    )


def text(outcomes: Mapping[str, Outcome], before: str = "") -> str:
    """All of SOAK.md; of sweeps that were not run, what it said before."""
    rows, failures, kinds, left = [], [], [], []
    for name, sweep in SWEEPS.items():
        if name not in outcomes:
            rows += lines(before, f"| {name} |")
            failures += lines(before, f"- `python -m tests.soak --case {name} ")
            kinds += lines(before, f"**{name}**: ")
            left += lines(before, f"- {name}: ")
            continue
        outcome = outcomes[name]
        rows.append(row(name, outcome))
        failures += [
            f"- `python -m tests.soak --case {name} '{shown(case)}'`: {why.splitlines()[0][:300]}"
            for case, why in outcome.failures
        ]
        groups = ", ".join(f"{group} {count:,}" for group, count in sorted(outcome.groups.items()))
        kinds.append(f"**{name}**: {groups}.")
        left += [f"- {name}: {what}" for what in sweep.not_run()]
    notes = re.search(r"^## Notes\n.*?(?=\n+## |\Z)", before, re.M | re.S)  # written by hand
    parts = [
        HEAD + "\n".join(f"| {k} | {v} |" for k, v in machine().items()),
        "\n".join([TABLE, *rows]),
        *(
            f"## {title}\n" + "\n".join(said)
            for title, said in (("Failures", failures), ("Not run", left))
            if said
        ),
        *([notes[0]] if notes else []),
        "## Kinds of causes, and how many of each",
        *kinds,
    ]
    return "\n\n".join(parts) + "\n"


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]
