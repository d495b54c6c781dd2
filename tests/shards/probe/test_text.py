"""Ridge regression of latents on captions: fitted out of fold, and of a known dependence."""

from __future__ import annotations

import numpy as np
import pytest

from shards.errors import BadStatistics
from shards.probe.spectra import linear_references
from shards.probe.text import FOLDS, PENALTIES, Ridge, folds, residual_maker, sketch
from tests.shards.probe.known import SIGMAS, ArrayRows, mixed, white


def test_residuals_are_those_of_a_fit_on_the_other_folds() -> None:
    generator = np.random.default_rng(0)
    for width in (7, 90):  # fewer and more features than rows
        text = (generator.standard_normal((60, width)) * 3 + 5).astype(np.float32)
        text[:, 0] = 2  # a feature without deviation
        y = generator.standard_normal((60, 4)) + text[:, 1:5] + 10
        maker, penalties = residual_maker(text, y.astype(np.float32), folds(60), penalty=0.1)
        assert penalties == [0.1] * FOLDS
        for row in range(60):
            inside = [i for i in range(60) if i % FOLDS != row % FOLDS]
            x = text[inside].astype(np.float64)
            mean, scale = x.mean(0), np.where(x.std(0) > 1e-5, x.std(0), 1)
            x = (x - mean) / scale
            rank = min(len(inside) - 1, width - 1)
            unit = np.square(x).sum() / rank  # of the features along each direction
            matrix = x.T @ x + 0.1 * unit * np.eye(width)
            weights = np.linalg.solve(matrix, x.T @ (y[inside] - y[inside].mean(0)))
            expected = y[row] - y[inside].mean(0) - (text[row] - mean) / scale @ weights
            np.testing.assert_allclose(maker[row] @ y, expected, rtol=1e-3, atol=2e-4)


def test_the_penalty_is_the_best_of_the_other_folds() -> None:
    generator = np.random.default_rng(1)
    text = generator.standard_normal((60, 20)).astype(np.float32)
    y = (text[:, :3] + 2 * generator.standard_normal((60, 3))).astype(np.float32)
    fold = folds(60)
    _, penalties = residual_maker(text, y, fold)
    for held_out in range(FOLDS):
        scores = []
        for penalty in PENALTIES:
            error = 0.0
            for number in set(range(FOLDS)) - {held_out}:
                inside, outside = (fold != held_out) & (fold != number), fold == number
                guess = Ridge(text[inside]).weights(text[outside], penalty) @ y[inside]
                error += float(np.square(y[outside] - guess).sum())
            scores.append(error)
        assert penalties[held_out] == PENALTIES[int(np.argmin(scores))]


def test_variants_of_one_picture_are_not_fitted_on_each_other() -> None:
    """Ten variants of each of 60 captions, which say nothing of each other: what is known of a picture by
    its variants is not known by its caption.
    """
    generator = np.random.default_rng(2)
    picture = np.repeat(np.arange(60), 10)  # dealt out to all folds by rows
    text = generator.standard_normal((60, 64))[picture] + 0.1 * generator.standard_normal((600, 64))
    latents = 2 * white(60, (3, 4, 4))[picture] + white(600, (3, 4, 4), 1)
    rows, words = ArrayRows(latents), text.astype(np.float32)
    apart = linear_references(rows, SIGMAS, words).text_r2
    together = linear_references(rows, SIGMAS, words, together=picture).text_r2
    assert apart is not None
    assert together is not None
    assert apart["value"] > 0.5
    assert -0.1 < together["value"] < 0.05
    with pytest.raises(BadStatistics, match="found rows in 1 folds"):
        linear_references(rows, SIGMAS, words, together=np.zeros(600, np.int64))


def test_rows_that_belong_together_are_in_one_fold() -> None:
    together = np.array([0, 0, 1, 7, 1, 0])
    assert [folds(6, together)[i] for i in (0, 1, 5)] == [0, 0, 0]
    assert folds(6, together)[2] == folds(6, together)[4]


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 5, 4), (64, 8, 8), (768, 16, 16)])
def test_the_values_that_choose_a_penalty_lie_everywhere(
    channels: int, height: int, width: int
) -> None:
    places = sketch(channels * height * width)
    assert len(set(places.tolist())) == len(places) >= 50
    assert places.max() < channels * height * width
    channel, row, column = np.unravel_index(places, (channels, height, width))
    assert len(set(row)) == height
    assert len(set(column)) == width
    assert len(set(channel)) >= min(channels, 100)


@pytest.mark.parametrize("shape", [(16, 8, 8), (128, 4, 4)])
def test_a_known_dependence_within_one_percent(shape: tuple[int, int, int]) -> None:
    residual, variances = mixed(white(2048, shape))
    generator = np.random.default_rng(5)
    text = generator.standard_normal((2048, 6)).astype(np.float32)
    text[:, 0] = 1  # of one caption for all
    maps = generator.standard_normal((6, *shape)).astype(np.float32)
    latents = residual + np.einsum("nd,dchw->nchw", text, maps, optimize=True) + 3
    references = linear_references(ArrayRows(latents), SIGMAS, text)
    assert references.given_text is not None
    assert references.text_r2 is not None
    truth = np.mean([np.mean(v / ((1 - s) ** 2 * v + s**2)) for s in SIGMAS for v in [variances]])
    result = references.given_text.errors.mean(slice(None))
    assert result["value"] == pytest.approx(truth, rel=0.01)
    assert result["value"] < 0.9 * references.plain.errors.mean(slice(None))["value"]
    explained = np.square(maps[1:]).sum() / np.prod(shape)
    share = explained / (explained + variances.mean())
    assert references.text_r2["value"] == pytest.approx(share, abs=0.02)


def test_captions_that_say_nothing_explain_nothing() -> None:
    latents, _ = mixed(white(1024, (8, 4, 4)))
    text = white(1024, (64, 1, 1), 9)[:, :, 0, 0]
    references = linear_references(ArrayRows(latents), SIGMAS, text)
    assert references.text_r2 is not None
    assert references.given_text is not None
    assert -0.02 < references.text_r2["value"] < 0.01
    plain, given = (s.errors.mean(slice(None)) for s in (references.plain, references.given_text))
    assert given["value"] == pytest.approx(plain["value"], rel=0.01)
