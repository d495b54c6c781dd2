"""Properties of hypothesis as a sweep: a case is a seed, under which it draws some inputs."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.soak.sweep import Case, Sweep

INPUTS = 25
Property = tuple[Callable[..., None], tuple[Any, ...]]  # a function, a strategy for each argument


def properties(name: str, tests: Mapping[str, Property], seeds: int) -> Sweep:
    """A sweep of named properties, each under so many seeds."""

    def cases() -> list[Case]:
        return [(test, number) for number in range(seeds) for test in tests]

    def check(test: str, number: int) -> list[int]:
        body, strategies = tests[test]
        digests: list[int] = []

        @seed(number)
        @settings(
            max_examples=INPUTS, deadline=None, database=None, print_blob=False,
            phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.tuples(*strategies))
        def tried(drawn: tuple[Any, ...]) -> None:
            digests.append(digest_of(test, drawn))
            body(*drawn)

        tried()
        return digests

    counts = f"{INPUTS} inputs that hypothesis draws for a property"
    return Sweep(name, counts, cases, check, lambda case: str(case[0]))


def digest_of(test: str, drawn: tuple[Any, ...]) -> int:
    with np.printoptions(threshold=sys.maxsize):
        text = f"{test} {drawn!r}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")
