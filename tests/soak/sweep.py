"""A sweep is a list of cases and a check of one case. Fast tests draw a sample of it, the soak runs all.

    SWEEPS = [Sweep("kills", "a system call and how the writer dies at it", cases, check, group)]

A case is a tuple of strings and integers, so that a failure can be written down and run again:

    python -m tests.soak --case kills '["moments", "kill before", 17, "17 write c/.tmp-*"]'
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Case = tuple[str | int, ...]
SECONDS = 120  # a case that takes longer hangs


@dataclass(frozen=True, slots=True)
class Sweep:
    """All cases of one kind of fault.

    `check` raises where the case is not borne. It returns None, or, where a case is many inputs
    drawn by chance, a digest of each, so that inputs are counted once, or such digests by the kind of
    outcome that each had. `group` names the kind of
    cause that a case is, for the breakdown in the report. `not_run` says what cannot be run on this
    machine, or is left out, and why.
    """

    name: str
    counts: str  # what one case is
    cases: Callable[[], Sequence[Case]]
    check: Callable[..., Mapping[str, Sequence[int]] | Sequence[int] | None]
    group: Callable[[Case], str]
    seconds: float = SECONDS
    not_run: Callable[[], Sequence[str]] = tuple


@dataclass(slots=True)
class Outcome:
    """What became of some cases."""

    cases: int = 0
    inputs: list[int] = field(default_factory=list)  # digests, where a case is many inputs
    groups: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[Case, str]] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after so long."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(sweep: Sweep, cases: Sequence[Case]) -> Outcome:
    """Check some cases; a failure is recorded with its case, and the next one follows."""
    outcome, start = Outcome(), time.monotonic()
    for case in cases:
        outcome.cases += 1
        try:
            with limit(sweep.seconds):
                digests = sweep.check(*case)
        except (Exception, TimeoutError) as error:
            outcome.failures.append((case, f"{type(error).__name__}: {error}"[:2000]))
            digests = None
        by_kind = digests if isinstance(digests, Mapping) else {sweep.group(case): digests}
        for kind, inputs in by_kind.items():
            outcome.inputs += inputs or []
            outcome.groups[kind] = outcome.groups.get(kind, 0) + (len(inputs) if inputs else 1)
    outcome.seconds = time.monotonic() - start
    return outcome


def sample(sweep: Sweep, count: int, seed: int = 0) -> list[Case]:
    """Cases by chance, of every group at least one while they last: what a fast test runs."""
    chance = random.Random(f"{sweep.name} {seed}")
    cases = list(sweep.cases())
    chance.shuffle(cases)
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(sweep.group(case), case)
    picked = list(first.values())[:count]
    rest = [case for case in cases if case not in set(picked)]
    return picked + rest[: count - len(picked)]
