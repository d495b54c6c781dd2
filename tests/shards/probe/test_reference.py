"""The linear reference: closed forms of known Gaussians, and each sum against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from shards.probe.estimates import GROUPS, T, estimate
from shards.probe.reference import ErrorSums, linear_error
from shards.probe.spectra import Frequencies, linear_references, work
from tests.shards.probe.known import SIGMAS, ArrayRows, mixed, white


def truth(variances: np.ndarray) -> np.ndarray:
    """The mean of L / ((1 - s)^2 L + s^2) at each level, written out."""
    return np.array([np.mean([v / ((1 - s) ** 2 * v + s**2) for v in variances]) for s in SIGMAS])


def values(sums: ErrorSums) -> np.ndarray:
    return np.array([level["value"] for level in sums.by_sigma()])


def test_the_closed_form_is_what_linear_regression_leaves() -> None:
    generator = np.random.default_rng(0)
    for variance, sigma in ((0.3, 0.9), (4.0, 0.2), (1.0, 0.5)):
        x = np.sqrt(variance) * generator.standard_normal(200_000)
        e = generator.standard_normal(200_000)
        noisy, velocity = (1 - sigma) * x + sigma * e, e - x
        left = velocity - noisy * (velocity @ noisy) / (noisy @ noisy)
        assert np.mean(left**2) == pytest.approx(linear_error(variance, sigma), rel=0.02)


def test_its_mean_over_uniform_levels_is_viv() -> None:
    levels = (np.arange(20_000) + 0.5) / 20_000
    for variance in (0.01, 1.0, 30.0):
        mean = linear_error(variance, levels).mean()
        assert mean == pytest.approx(np.pi / 2 * np.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 4), (4, 5), (3, 7), (1, 6), (2, 1)])
def test_half_of_the_frequencies_count_for_all(height: int, width: int) -> None:
    half = Frequencies.of(height, width)
    conjugates = {
        tuple(sorted([(r, c), (-r % height, -c % width)]))
        for r in range(height)
        for c in range(width)
    }
    places = list(zip(half.row.tolist(), half.column.tolist(), strict=True))
    assert {tuple(sorted([(r, c), (-r % height, -c % width)])) for r, c in places} == conjugates
    assert len(places) == len(conjugates)
    assert half.weight.sum() == height * width
    thinned = half.thinned(3)
    assert len(thinned) == min(3, len(half))
    assert thinned.weight.sum() == height * width


@pytest.mark.parametrize("shape", [(16, 8, 8), (128, 4, 4)])
def test_known_spectra_within_one_percent(shape: tuple[int, int, int]) -> None:
    noise = white(2048, shape)
    for latents, variances in ((noise, np.ones(1)), mixed(noise)):
        references = linear_references(ArrayRows(latents), SIGMAS)
        result = values(references.plain.errors)
        np.testing.assert_allclose(result.mean(), truth(variances).mean(), rtol=0.01)
        viv = references.plain.errors.viv()["value"]
        assert viv == pytest.approx(np.pi / 2 * np.sqrt(variances).mean(), rel=0.01)


def test_above_128_channels_the_truth_lies_between() -> None:
    for latents, variances in (
        (white(2048, (256, 2, 2)), np.ones(1)),
        mixed(white(2048, (256, 2, 2))),
    ):
        references = linear_references(ArrayRows(latents), SIGMAS)
        assert references.plain.held_out is not None
        below, above = values(references.plain.errors), values(references.plain.held_out)
        assert below.mean() < truth(variances).mean() < above.mean()
        assert above.mean() / below.mean() < 1.25


def test_up_to_128_channels_one_figure_is_enough() -> None:
    references = linear_references(ArrayRows(white(2048, (128, 2, 2))), SIGMAS)
    assert references.plain.held_out is None


def test_sums_are_those_of_plain_loops() -> None:
    generator = np.random.default_rng(3)
    latents = generator.standard_normal((70, 3, 5, 4)).astype(np.float32).cumsum(2)
    variance = generator.random(latents.shape).astype(np.float32)
    rows = ArrayRows(latents, variance, block=9)
    counted: list[int] = []
    references = linear_references(rows, SIGMAS, advance=counted.append)
    noise = np.diag(variance.astype(np.float64).mean((0, 2, 3)))
    errors, high, total, roots = np.zeros(len(SIGMAS)), 0.0, 0.0, 0.0
    for row in range(5):
        for column in range(4):
            wave = np.exp(
                -2j * np.pi * (row * np.arange(5)[:, None] / 5 + column * np.arange(4) / 4)
            ) / np.sqrt(20)
            transform = np.array([[(x * wave).sum() for x in image] for image in latents])
            transform -= transform.mean(0)
            covariance = sum(np.outer(t.conj(), t) for t in transform) / 69 + noise
            result = np.linalg.eigvalsh(covariance)
            errors += [(v / ((1 - s) ** 2 * v + s**2)).sum() for s in SIGMAS for v in [result]]
            y, x = min(row, 5 - row) / 2.5, min(column, 4 - column) / 2
            high += result.sum() * (np.hypot(x, y) > 0.5)
            total += result.sum()
            roots += np.sqrt(result).sum()
    np.testing.assert_allclose(values(references.plain.errors), errors / 60, rtol=1e-5)
    assert references.high_share()["value"] == pytest.approx(high / total, rel=1e-5)
    assert references.plain.errors.viv()["value"] == pytest.approx(np.pi / 2 * roots / 60, rel=1e-5)
    assert sum(counted) == work(rows)


def test_memory_for_few_frequencies_reads_the_rows_again_and_says_the_same() -> None:
    latents = white(70, (3, 5, 4))
    text = white(70, (6, 1, 1))[:, :, 0, 0]
    once = linear_references(ArrayRows(latents), SIGMAS, text)
    often = linear_references(ArrayRows(latents), SIGMAS, text, memory=3 * 8 * 70 * 3)
    for a, b in ((once.plain, often.plain), (once.given_text, often.given_text)):
        assert a is not None
        assert b is not None
        np.testing.assert_allclose(a.errors.errors, b.errors.errors, rtol=1e-5)
        np.testing.assert_allclose(a.power, b.power, rtol=1e-5)


def test_some_frequencies_stand_for_all() -> None:
    latents, variances = mixed(white(2048, (8, 16, 16)))
    references = linear_references(ArrayRows(latents), SIGMAS, most=40)
    assert references.frequencies == (40, 130)
    np.testing.assert_allclose(
        values(references.plain.errors).mean(), truth(variances).mean(), rtol=0.03
    )


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_the_posterior_adds_what_drawing_it_adds(seed: int) -> None:
    mean, _ = mixed(white(2048, (4, 4, 4), seed))
    variance = np.random.default_rng(seed).random(mean.shape).astype(np.float32)
    drawn = mean + np.sqrt(variance) * white(2048, (4, 4, 4), seed + 1)
    exact = values(linear_references(ArrayRows(mean, variance), SIGMAS).plain.errors)
    by_noise = values(linear_references(ArrayRows(drawn), SIGMAS).plain.errors)
    np.testing.assert_allclose(exact, by_noise, rtol=0.02)


def test_intervals_are_as_wide_as_other_rows_differ() -> None:
    estimates = []
    for seed in range(40):
        latents, variances = mixed(white(256, (3, 4, 4), seed))
        estimates.append(linear_references(ArrayRows(latents), SIGMAS).plain.errors.mean(slice(8)))
    result = np.array([e["value"] for e in estimates])
    half = np.array([(e["high"] - e["low"]) / 2 for e in estimates])
    assert half.mean() == pytest.approx(T * result.std(ddof=1), rel=0.35)


def test_a_mean_has_the_interval_of_its_groups() -> None:
    rows = np.random.default_rng(0).standard_normal(160)
    groups = [rows[np.arange(160) % GROUPS == g] for g in range(GROUPS)]
    without = [(rows.sum() - g.sum()) / 150 for g in groups]
    result = estimate(np.array([rows.mean(), *without]))
    # of equal groups the jackknife is the standard error of the mean of their means
    error = np.std([g.mean() for g in groups], ddof=1) / np.sqrt(GROUPS)
    assert result["high"] - result["value"] == pytest.approx(T * error)
