"""Training seeds and prompts in a distance: the interval of its difference, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from eval.distances.frechet import Floats, Gaussian, influence
from eval.scores.seeds import variances

WIDTH, PROMPTS, STUDIES = 4, 100, 300
REFERENCE = Gaussian(np.zeros(WIDTH), np.eye(WIDTH), 0)
# deviations of the features' mean by seed, of features by prompt, and of what is left
CELLS = {
    "seeds only": (0.15, 0.0, 0.8),
    "equal": (0.1, 0.7, 0.5),
    "prompts only": (0.0, 0.8, 0.3),
    "seeds three times prompts": (0.3, 0.7, 0.5),
}


def differences(cell: str, seeds: int) -> tuple[Floats, Floats]:
    """Differences (STUDIES, S) of two entries at 0.5 and 0.7 from the reference, and influences (STUDIES, S, P)."""
    chance = np.random.default_rng(seeds)
    of_seeds, of_prompts, of_both = CELLS[cell]
    values, influences = np.empty((STUDIES, seeds)), np.empty((STUDIES, seeds, PROMPTS))
    for study in range(STUDIES):
        features = (
            np.array([0.5, 0.7])[:, None, None, None]
            + of_seeds * chance.standard_normal((2, seeds, 1, WIDTH))
            + of_prompts * chance.standard_normal((2, 1, PROMPTS, WIDTH))
            + of_both * chance.standard_normal((2, seeds, PROMPTS, WIDTH))
        )
        for seed in range(seeds):
            (a, of_a), (b, of_b) = (influence(side[seed], REFERENCE) for side in features)
            values[study, seed], influences[study, seed] = b - a, (of_b - of_a) / PROMPTS
    return values, influences


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_of_a_distance_over_seeds_holds_the_mean_of_all_studies(seeds: int) -> None:
    """A finite number of pictures adds to a distance; the mean over studies has that in it."""
    shares = {}
    for cell in CELLS:
        values, influences = differences(cell, seeds)
        of_seeds, of_prompts, residual = variances(values, influences, [np.arange(PROMPTS)], False)
        assert not residual.any()
        half = np.sqrt(t.ppf(0.975, seeds - 1) ** 2 * of_seeds + 1.96**2 * of_prompts)
        shares[cell] = np.mean(np.abs(values.mean(-1) - values.mean()) <= half)
    assert {cell: share for cell, share in shares.items() if share < 0.93} == {}
    assert np.mean(list(shares.values())) <= 0.99
