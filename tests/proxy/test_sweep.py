"""A sample of the sweep of faults that befall stores; `make soak` runs all of it."""

import pytest

from tests.proxy.sweep import SWEEP
from tests.soak.sweep import Case, sample


@pytest.mark.parametrize("case", sample(SWEEP, 12), ids=lambda case: " ".join(map(str, case)))
def test_faults_by_chance(case: Case) -> None:
    SWEEP.check(*case)
